/* See gguf_quant.h. */
#include "run/gguf_quant.h"

#include "base/json.h"
#include "base/mem.h"
#include "base/version.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

/* BATCH: values that are read at once; TRANSPOSED: rows at which views that are read along their columns are fastest. */
enum { BATCH = 512 << 10, TRANSPOSED = 96 };

struct moec_gguf_quant {
    moec_gguf_out *g;
    moec_gguf_quant_source rows;
    char *name;
    char *manifest; /* of a folder; NULL: one file */
};

/* --- rows ------------------------------------------------------------------------------------------------------------ */

moec_block moec_gguf_quant_block(uint32_t type)
{
    int b = 0;
    while (b < MOEC_BLOCK_COUNT && (uint32_t)moec_blocks[b].ggml != type)
        b++;
    return (moec_block)b;
}

static moec_status quantize_rows(unsigned char *out, const moec_gguf_quant_source *s, size_t t, int64_t lo, int64_t hi, moec_err *err)
{
    moec_status st = MOEC_OK;
    float *values = NULL;
    const moec_gguf_tensor *what = moec_gguf_model_at(s->x, t);
    const int64_t n = what->dim[0];
    const moec_block type = moec_gguf_quant_block(what->type);
    const int64_t bytes = moec_blocks_bytes(type, n);
    int64_t step = n > 0 && BATCH / n > 0 ? BATCH / n : 1;
    step = step > TRANSPOSED ? TRANSPOSED : step;
    MOEC_TRY(moec_alloc((void **)&values, (size_t)(hi - lo < step ? hi - lo : step), (size_t)n * sizeof *values, err));
    for (int64_t from = lo; from < hi; from += step) {
        const int64_t end = hi - from < step ? hi : from + step;
        MOEC_TRY(moec_gguf_model_read(values, s->x, t, from, end, err));
        for (int64_t r = from; r < end; r++, out += bytes) {
            const float *weigh = s->importance ? moec_gguf_importance_row(s->importance, t, r) : NULL;
            MOEC_TRY(moec_within(err, moec_blocks_write(out, values + (r - from) * n, weigh, n, type, err), "%s: row %" PRId64, what->name, r));
        }
    }
done:
    moec_free(values);
    return st;
}

moec_status moec_gguf_quant_rows(void *out, void *ctx, size_t t, int64_t lo, int64_t hi, moec_err *err)
{
    const moec_gguf_quant_source *s = ctx;
    const moec_gguf_tensor *what = moec_gguf_model_at(s->x, t);
    const bool plain = what->type == MOEC_GGML_F32 || (what->type == MOEC_GGML_MXFP4 && moec_gguf_model_codes(s->x, t));
    const moec_status st = plain ? moec_gguf_model_rows(out, s->x, t, lo, hi, err) : quantize_rows(out, s, t, lo, hi, err);
    moec_gguf_model_drop(s->x, t, lo, hi);
    if (s->importance)
        moec_gguf_importance_drop(s->importance, t, hi);
    return st;
}

/* --- the description ------------------------------------------------------------------------------------------------- */

static void put_about(moec_gguf_out *g, const moec_gguf_quant_opts *o)
{
    moec_gguf_put_text(g, "general.quantized_by", "moecompress");
    moec_gguf_put_text(g, "moecompress.version", moec_version());
    moec_gguf_put_text(g, "moecompress.request", o->asked);
    moec_gguf_put_text(g, "moecompress.source", o->fingerprint);
    moec_gguf_put_f32(g, "moecompress.bits", (float)o->bits);
    if (o->tokens > 0)
        moec_gguf_put_u32(g, "moecompress.tokens", o->tokens > UINT32_MAX ? UINT32_MAX : (uint32_t)o->tokens);
    if (!isnan(o->cost))
        moec_gguf_put_f32(g, "moecompress.expected_kl", (float)o->cost);
}

/* A folder says what it is, so that it can be replaced. */
static moec_status make_manifest(moec_gguf_quant *q, const moec_gguf_quant_opts *o, moec_err *err)
{
    moec_json *root = moec_json_new_object();
    moec_json_set(root, "moecompress", moec_json_new_string(moec_version()));
    moec_json_set(root, "format", moec_json_new_string("gguf"));
    moec_json_set(root, "request", moec_json_new_string(o->asked));
    moec_json_set(root, "files", moec_json_new_int((int64_t)moec_gguf_out_files(q->g)));
    const moec_status st = moec_json_dump(&q->manifest, root, 2, err);
    moec_json_free(root);
    return st;
}

moec_status moec_gguf_quant_new(moec_gguf_quant **out, const moec_gguf_model *x, const moec_gguf_out *tokenizer,
                                const moec_gguf_quant_opts *o, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_gguf_quant *q = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(q, 1, err));
    MOEC_TRY(moec_copy(&q->name, o->name, strlen(o->name), err));
    MOEC_TRY(moec_gguf_out_new(&q->g, err));
    moec_gguf_model_describe(q->g, x, o->name);
    put_about(q->g, o);
    moec_gguf_put_keys(q->g, tokenizer);
    MOEC_TRY(moec_gguf_out_close(q->g, o->shard_bytes, err));
    if (o->shard_bytes > 0)
        MOEC_TRY(make_manifest(q, o, err));
    q->rows.x = (moec_gguf_model *)x; /* only read: contexts of callbacks are not const */
    *out = q;
    q = NULL;
done:
    moec_gguf_quant_free(q);
    return st;
}

void moec_gguf_quant_free(moec_gguf_quant *q)
{
    if (!q)
        return;
    moec_gguf_out_free(q->g);
    moec_free(q->manifest);
    moec_free(q->name);
    moec_free(q);
}

size_t moec_gguf_quant_files(const moec_gguf_quant *q)
{
    return moec_gguf_out_files(q->g);
}

uint64_t moec_gguf_quant_size(const moec_gguf_quant *q)
{
    uint64_t sum = q->manifest ? strlen(q->manifest) : 0;
    for (size_t i = 0; i < moec_gguf_out_files(q->g); i++)
        sum += moec_gguf_out_size(q->g, i);
    return sum;
}

/* --- the writing ----------------------------------------------------------------------------------------------------- */

moec_status moec_gguf_quant_write(moec_gguf_quant *q, const moec_gguf_importance *importance, const moec_gguf_quant_where *w, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_out *o = NULL;
    moec_writer *writer = NULL;
    char *identity = NULL;
    q->rows.importance = importance;
    MOEC_TRY(moec_out_new(&o, err));
    MOEC_TRY(moec_gguf_out_plan(o, q->g, q->name, moec_gguf_quant_rows, &q->rows, err));
    if (q->manifest)
        MOEC_TRY(moec_out_text(o, MOEC_MANIFEST, q->manifest, strlen(q->manifest), err));
    MOEC_TRY(moec_out_close(o, err));
    MOEC_TRY(moec_format(&identity, err, "gguf %s %s", moec_version(), w->identity));
    const moec_writer_options opt = {.dir = w->out, .magic = q->manifest ? NULL : "GGUF", .source = w->source, .identity = identity,
                                     .overwrite = w->overwrite, .resume = w->resume};
    MOEC_TRY(moec_writer_open(&writer, o, &opt, err));
    MOEC_TRY(moec_writer_run(writer, err));
    MOEC_TRY(moec_writer_publish(writer, err));
done:
    moec_writer_close(writer);
    moec_free(identity);
    moec_out_free(o);
    return st;
}
