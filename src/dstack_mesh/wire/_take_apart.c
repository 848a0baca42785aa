/* wire/take_apart.py's work at the speed of C. What it does is said there, and tested there against
 * the same work in Python: tests/wire/test_take_apart.py.
 *
 * It reads one bytes object, never beyond its length, and writes into one that it has made itself,
 * never more than the length of the first. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define MAX_FIELDS 128
#define MAX_ENTRIES 32
#define MAX_NAME 32
#define CAPSULE "dstack_mesh.wire.table"

/* Flags of an entry; the numbers are those of take_apart.py. */
#define DROP_EXACT 1
#define DROP_ALIKE 2
#define TELL_ALIKE 4

typedef struct {
    uint8_t name[MAX_NAME];
    Py_ssize_t length;
    int flags;
} Entry;

typedef struct {
    Py_ssize_t count;
    Entry entries[MAX_ENTRIES];
    /* Whether any entry's name has this length: most names can be passed over at once. */
    uint8_t lengths[MAX_NAME + 1];
} Table;

static uint8_t is_token[256], is_value[256], alike[256], lower[256];

static void fill_classes(void)
{
    for (int c = 0; c < 256; c++) {
        int upper_letter = c >= 'A' && c <= 'Z';
        int alphanumeric = upper_letter || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
        lower[c] = (uint8_t)(upper_letter ? c + 32 : c);
        alike[c] = alphanumeric ? lower[c] : '-';
        is_token[c] = alphanumeric || (c && strchr("!#$%&'*+-.^_`|~", c) != NULL);
        is_value[c] = c >= 0x20 && c != 0x7f;
    }
}

static void free_table(PyObject *capsule)
{
    PyMem_Free(PyCapsule_GetPointer(capsule, CAPSULE));
}

static PyObject *table(PyObject *Py_UNUSED(module), PyObject *pairs)
{
    if (!PyTuple_CheckExact(pairs) || PyTuple_GET_SIZE(pairs) > MAX_ENTRIES) {
        PyErr_SetString(PyExc_ValueError, "a tuple of at most 32 pairs of name and flags");
        return NULL;
    }
    Table *made = PyMem_Calloc(1, sizeof(Table));
    if (made == NULL)
        return PyErr_NoMemory();
    made->count = PyTuple_GET_SIZE(pairs);
    for (Py_ssize_t i = 0; i < made->count; i++) {
        const char *name;
        Entry *entry = &made->entries[i];
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(pairs, i), "y#i", &name, &entry->length, &entry->flags))
            goto failed;
        if (entry->length < 1 || entry->length > MAX_NAME) {
            PyErr_SetString(PyExc_ValueError, "a name of 1 to 32 bytes");
            goto failed;
        }
        memcpy(entry->name, name, (size_t)entry->length);
        made->lengths[entry->length] = 1;
    }
    PyObject *capsule = PyCapsule_New(made, CAPSULE, free_table);
    if (capsule != NULL)
        return capsule;
failed:
    PyMem_Free(made);
    return NULL;
}

static const Entry *find(const Table *names, const uint8_t *name, Py_ssize_t length)
{
    uint8_t normal[MAX_NAME];
    if (length > MAX_NAME || !names->lengths[length])
        return NULL;
    for (Py_ssize_t i = 0; i < length; i++)
        normal[i] = alike[name[i]];
    for (Py_ssize_t i = 0; i < names->count; i++) {
        const Entry *entry = &names->entries[i];
        if (entry->length == length && memcmp(entry->name, normal, (size_t)length) == 0)
            return entry;
    }
    return NULL;
}

static int is_exact(const Entry *entry, const uint8_t *name)
{
    for (Py_ssize_t i = 0; i < entry->length; i++)
        if (lower[name[i]] != entry->name[i])
            return 0;
    return 1;
}

/* Put (index, exact, name, value) behind `found`. */
static int tell(PyObject *found, Py_ssize_t index, int exact, const uint8_t *name, Py_ssize_t length,
                const uint8_t *value, const uint8_t *end)
{
    PyObject *one = PyTuple_New(4);
    if (one == NULL)
        return -1;
    PyTuple_SET_ITEM(one, 0, PyLong_FromSsize_t(index));
    PyTuple_SET_ITEM(one, 1, Py_NewRef(exact ? Py_True : Py_False));
    PyTuple_SET_ITEM(one, 2, PyBytes_FromStringAndSize((const char *)name, length));
    PyTuple_SET_ITEM(one, 3, PyBytes_FromStringAndSize((const char *)value, end - value));
    int failed = PyErr_Occurred() != NULL || PyList_Append(found, one) < 0;
    Py_DECREF(one);
    return failed ? -1 : 0;
}

static PyObject *take_apart(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 2 || !PyBytes_CheckExact(args[0])) {
        PyErr_SetString(PyExc_TypeError, "take_apart(block: bytes, table)");
        return NULL;
    }
    const Table *names = PyCapsule_GetPointer(args[1], CAPSULE);
    if (names == NULL)
        return NULL;
    const uint8_t *at = (const uint8_t *)PyBytes_AS_STRING(args[0]);
    const uint8_t *end = at + PyBytes_GET_SIZE(args[0]);
    const uint8_t *kept = at; /* from where on nothing is copied yet */
    PyObject *rest = NULL, *found = PyList_New(0);
    uint8_t *out = NULL;
    if (found == NULL)
        return NULL;

    for (int count = 0; at < end; count++) {
        const uint8_t *line = at;
        while (at < end && is_token[*at])
            at++;
        const uint8_t *colon = at;
        if (count == MAX_FIELDS || colon == line || end - colon < 5 || colon[0] != ':' || colon[1] != ' ')
            goto not_normal;
        const uint8_t *value = at = colon + 2;
        while (at < end && is_value[*at])
            at++;
        if (at == value || end - at < 2 || at[0] != '\r' || at[1] != '\n' || *value == ' ' || at[-1] == ' ')
            goto not_normal;
        const uint8_t *value_end = at;
        at += 2;

        const Entry *entry = find(names, line, colon - line);
        if (entry == NULL)
            continue;
        int exact = is_exact(entry, line);
        if ((exact || entry->flags & TELL_ALIKE)
            && tell(found, entry - names->entries, exact, line, colon - line, value, value_end) < 0)
            goto failed;
        if (!(entry->flags & (exact ? DROP_EXACT : DROP_ALIKE)))
            continue;
        if (rest == NULL) {
            rest = PyBytes_FromStringAndSize(NULL, PyBytes_GET_SIZE(args[0]));
            if (rest == NULL)
                goto failed;
            out = (uint8_t *)PyBytes_AS_STRING(rest);
        }
        memcpy(out, kept, (size_t)(line - kept));
        out += line - kept;
        kept = at;
    }
    if (rest == NULL) {
        rest = Py_NewRef(args[0]);
    } else {
        memcpy(out, kept, (size_t)(end - kept));
        out += end - kept;
        if (_PyBytes_Resize(&rest, out - (uint8_t *)PyBytes_AS_STRING(rest)) < 0)
            goto failed;
    }
    PyObject *both = PyTuple_Pack(2, rest, found);
    Py_DECREF(rest);
    Py_DECREF(found);
    return both;

not_normal:
    Py_XDECREF(rest);
    Py_DECREF(found);
    Py_RETURN_NONE;
failed:
    Py_XDECREF(rest);
    Py_DECREF(found);
    return NULL;
}

static PyMethodDef methods[] = {
    {"table", table, METH_O, "Make the table of names that `take_apart` wants."},
    {"take_apart", (PyCFunction)(void (*)(void))take_apart, METH_FASTCALL, "See take_apart.py."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_take_apart", "See take_apart.py.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__take_apart(void)
{
    fill_classes();
    return PyModule_Create(&definition);
}
