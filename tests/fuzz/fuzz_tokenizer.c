/* Any bytes as tokenizer.json and as text: the file, a byte FF (which no JSON holds), the text. What loads must
 * encode and decode, or fail with a code and a text. */
#include "base/mem.h"
#include "text/tokenizer.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(moec_status st, const moec_err *err)
{
    if (st != MOEC_OK && (err->code != st || err->text[0] == '\0'))
        abort();
}

static void round_trip(moec_encoder *e, const moec_tokenizer *t, const char *text, size_t len, bool special)
{
    moec_err err = {MOEC_OK, ""};
    moec_ids ids = {0};
    moec_encode_opts opts = {.add_special = special};
    char *back = NULL;
    size_t n = 0;
    moec_status st = moec_encode(&ids, NULL, e, text, len, &opts, &err);
    check(st, &err);
    for (size_t i = 0; i < ids.n; i++)
        if (ids.id[i] < 0)
            abort();
    if (st == MOEC_OK) {
        st = moec_decode(&back, &n, t, ids.id, ids.n, special, &err);
        check(st, &err);
        if (st == MOEC_OK && (!back || back[n] != '\0'))
            abort();
    }
    moec_free(back);
    moec_ids_release(&ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    moec_err err = {MOEC_OK, ""};
    moec_tokenizer *t = NULL;
    moec_encoder *e = NULL;
    const uint8_t *cut = size ? memchr(data, 0xff, size) : NULL;
    size_t n_json = cut ? (size_t)(cut - data) : size;
    const char *text = cut ? (const char *)cut + 1 : "";
    size_t n_text = cut ? size - n_json - 1 : 0;
    moec_status st = moec_tokenizer_parse(&t, size ? (const char *)data : "", n_json, "fuzz", &err);
    check(st, &err);
    if (st == MOEC_OK && moec_encoder_new(&e, t, &err) == MOEC_OK) {
        round_trip(e, t, text, n_text, false);
        round_trip(e, t, text, n_text, true); /* with what the first left in the cache */
    }
    moec_encoder_free(e);
    moec_tokenizer_free(t);
    return 0;
}
