/* config.json from anywhere: parsing ends in a value or in a code with a text; what was parsed can be written and read
 * again; editing one value leaves valid JSON in which that value, and nothing else, is new. */
#include "base/json.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(bool holds)
{
    if (!holds)
        abort();
}

static char *dump(const moec_json *v)
{
    char *text;
    moec_err err;
    check(moec_json_dump(&text, v, 0, &err) == MOEC_OK);
    return text;
}

/* Keys that an edit path can spell and that are written in the file as they are. */
static bool is_plain_key(const char *key)
{
    for (const char *c = key; *c; c++)
        if (*c < ' ' || *c == '.' || *c == '"' || *c == '\\' || *c == 0x7f)
            return false;
    return *key != '\0';
}

static void edit_key(const char *text, const moec_json *before, const char *key)
{
    char *edited;
    moec_err err = {MOEC_OK, ""};
    moec_status st = moec_json_edit(&edited, text, key, "{\"new\": [7]}", &err);
    if (st != MOEC_OK) {
        check(st == MOEC_EINVAL && strchr(text, '\\')); /* only a key spelled with escapes is not found */
        return;
    }
    moec_json *after, *want = moec_json_clone(before);
    check(moec_json_parse(&after, edited, strlen(edited), "edited", &err) == MOEC_OK);
    moec_json *value = moec_json_new_object(), *list = moec_json_new_array();
    moec_json_push(list, moec_json_new_int(7));
    moec_json_set(value, "new", list);
    moec_json_set(want, key, value);
    char *a = dump(after), *b = dump(want);
    check(strcmp(a, b) == 0);
    moec_free(a);
    moec_free(b);
    moec_json_free(after);
    moec_json_free(want);
    moec_free(edited);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    moec_json *v, *again;
    moec_err err = {MOEC_OK, ""};
    moec_status st = moec_json_parse(&v, (const char *)data, size, "input", &err);
    if (st != MOEC_OK) {
        check(st == MOEC_EFORMAT && err.code == st && err.text[0] != '\0' && !v);
        return 0;
    }
    char *text = dump(v);
    check(moec_json_parse(&again, text, strlen(text), "again", &err) == MOEC_OK);
    char *second = dump(again);
    check(strcmp(text, second) == 0);
    moec_free(second);
    moec_json_free(again);
    moec_free(text);

    char *original;
    check(moec_copy(&original, (const char *)data, size, &err) == MOEC_OK);
    void *it = NULL;
    const char *key;
    moec_json *value;
    int edits = 0;
    if (moec_json_type(v) == MOEC_JSON_OBJECT)
        while (edits < 8 && moec_json_each(v, &it, &key, &value))
            if (is_plain_key(key) && ++edits)
                edit_key(original, v, key);
    moec_free(original);
    moec_json_free(v);
    return 0;
}
