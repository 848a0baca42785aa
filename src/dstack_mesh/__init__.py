"""A service mesh for dstack: mutual authentication between apps in confidential VMs."""

__version__ = "0.1.0"
