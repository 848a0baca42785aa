"""Settings: flags, environment and TOML file become one frozen tree, each value with its source."""
