/* Quantized weights in files: views of codes against reading them bit by bit, formats there and back, plans as text, what is refused,
 * and outputs that open, verify, and do not when they are damaged. */
#include "base/file.h"
#include "base/mem.h"
#include "base/random.h"
#include "run/apply.h"
#include "run/format.h"
#include "run/layout.h"
#include "run/preview.h"
#include "run/verify.h"
#include "support/tiny.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static char *folder, *source, *out, *work;
static moec_model *model;
static moec_digest print;

static int set_up(void **state)
{
    (void)state;
    folder = tiny_folder();
    source = tiny_path(folder, "source");
    out = tiny_path(folder, "out");
    work = tiny_path(folder, "work");
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    moec_model_close(model);
    tiny_remove(folder);
    char *all[] = {folder, source, out, work};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
    return 0;
}

static void must(moec_status st, const moec_err *err)
{
    if (st != MOEC_OK)
        fail_msg("%s", err->text);
}

static void open_new(const char *family)
{
    moec_err err = {MOEC_OK, ""};
    const tiny_spec spec = {.family = family, .hidden = 64, .width = 32, .seed = 5};
    moec_model_close(model);
    model = NULL;
    tiny_remove(source);
    tiny_remove(out);
    tiny_remove(work);
    must(tiny_write(source, &spec, &err), &err);
    must(moec_model_open(&model, source, &err), &err);
    must(moec_ckpt_fingerprint(&print, model->ckpt, &err), &err);
}

static uint64_t next(uint64_t *state)
{
    return moec_mix64((*state)++);
}

/* --- views ----------------------------------------------------------------------------------------------------------- */

enum { MOST = 96 * 128 };

/* Bits [at, at + n) of a stream whose 32-bit words are `step` words apart. */
static int bits_of(const unsigned char *data, int64_t first, int64_t step, int64_t at, int n)
{
    int v = 0;
    for (int k = 0; k < n; k++) {
        const int64_t bit = at + k, byte = 4 * (first + bit / 32 * step) + bit % 32 / 8;
        v |= (data[byte] >> (bit % 8) & 1) << k;
    }
    return v;
}

/* Value (r, c) as the formats' texts have it. */
static float value_of(const moec_weight *w, int64_t r, int64_t c)
{
    const bool gptq = w->storage == MOEC_GPTQ;
    const int64_t rows = w->rows, cols = w->cols, b = w->bits, words = (cols * b + 31) / 32, groups = cols / w->block_cols;
    const int64_t j = c / w->block_cols;
    const int u = gptq ? bits_of(w->of->data, r, rows, c * b, w->bits) : bits_of(w->of->data, r * words, 1, c * b, w->bits);
    int z = 1 << (w->bits - 1);
    if (w->zero)
        z = gptq ? bits_of(w->zero->data, j * (rows * b / 32), 1, r * b, w->bits) : bits_of(w->zero->data, j, groups, r * b, w->bits);
    if (w->zero)
        z = (z + w->zero_more) % (1 << w->bits);
    const int64_t i = gptq ? j * rows + r : r * groups + j;
    return ((const float *)w->scale->data)[i] * ((float)u - (float)z);
}

static void check_view(moec_storage storage, int bits, int64_t rows, int64_t cols, int64_t group, bool zeros, uint64_t *rng)
{
    static uint32_t code[MOST], zero[MOST];
    static float scale[MOST], got[MOST];
    const bool gptq = storage == MOEC_GPTQ;
    const int64_t words = (cols * bits + 31) / 32, groups = cols / group, zero_words = (rows * bits + 31) / 32;
    for (size_t i = 0; i < MOST; i++) {
        code[i] = (uint32_t)next(rng);
        zero[i] = (uint32_t)next(rng);
        scale[i] = (float)(int32_t)(uint32_t)next(rng) / 65536.0F;
    }
    const moec_tensor of = {.dtype = MOEC_I32, .rank = 2, .dim = {gptq ? words : rows, gptq ? rows : words}, .data = code,
                            .bytes = (size_t)(words * rows * 4)};
    const moec_tensor s = {.dtype = MOEC_F32, .rank = 2, .dim = {gptq ? groups : rows, gptq ? rows : groups}, .data = scale,
                           .bytes = (size_t)(groups * rows * 4)};
    const moec_tensor z = {.dtype = MOEC_I32, .rank = 2, .dim = {gptq ? groups : zero_words, gptq ? zero_words : groups}, .data = zero,
                           .bytes = (size_t)(groups * zero_words * 4)};
    const moec_weight w = {.of = &of, .scale = &s, .zero = zeros ? &z : NULL, .rows = rows, .cols = cols, .row_step = cols,
                           .col_step = 1, .block_cols = (int32_t)group, .storage = storage, .bits = (uint8_t)bits,
                           .zero_more = gptq && bits % 2 == 0};
    moec_err err = {MOEC_OK, ""};
    must(moec_weight_check(&w, &err), &err);
    const int64_t at[][4] = {{0, rows, 0, cols}, {3, rows - 5, 7, cols - 20}, {rows - 1, 1, cols - 1, 1}, {1, 2, 33, 40}};
    for (size_t k = 0; k < MOEC_COUNT(at); k++) {
        moec_weight_read(got, at[k][3], &w, at[k][0], at[k][1], at[k][2], at[k][3]);
        for (int64_t i = 0; i < at[k][1] * at[k][3]; i++)
            if (got[i] != value_of(&w, at[k][0] + i / at[k][3], at[k][2] + i % at[k][3]))
                fail_msg("storage %d, %d bits: value %lld of window %zu", (int)storage, bits, (long long)i, k);
    }
    moec_weight band = w; /* rows from the middle on, as those who go through a matrix in bands take them */
    band.at = 5 * cols;
    band.rows = 4;
    must(moec_weight_check(&band, &err), &err);
    moec_weight_read(got, cols, &band, 1, 1, 0, cols);
    for (int64_t c = 0; c < cols; c++)
        assert_true(got[c] == value_of(&w, 6, c));
    assert_int_equal(moec_weight_nonfinite(&w), -1);
    assert_int_equal(moec_weight_bytes(&w), of.bytes + s.bytes + (zeros ? z.bytes : 0));
    moec_weight bad = w;
    bad.rows = rows + 1;
    assert_int_equal(moec_weight_check(&bad, NULL), MOEC_EINVAL);
    bad = w;
    bad.bits = (uint8_t)(bits % 8 + 1);
    assert_int_equal(moec_weight_check(&bad, NULL), MOEC_EINVAL);
    bad = w;
    bad.block_cols = (int32_t)(2 * group);
    assert_int_equal(moec_weight_check(&bad, NULL), MOEC_EINVAL);
    bad = w;
    bad.at = 1;
    assert_int_equal(moec_weight_check(&bad, NULL), MOEC_EINVAL);
}

static void views_are_read_bit_by_bit(void **state)
{
    (void)state;
    uint64_t rng = 3;
    for (int bits = 1; bits <= 8; bits++) {
        check_view(MOEC_GPTQ, bits, 64, 96, 16, true, &rng);
        check_view(MOEC_GPTQ, bits, 32, 128, 64, true, &rng);
        check_view(MOEC_PACKED, bits, 37, 96, 24, false, &rng);
        check_view(MOEC_PACKED, bits, 48, 100, 50, true, &rng);
    }
}

/* --- formats --------------------------------------------------------------------------------------------------------- */

static void random_codes(moec_qcodes *c, const moec_qgrid *g, int64_t rows, int64_t cols, uint64_t *rng)
{
    moec_err err = {MOEC_OK, ""};
    must(moec_qcodes_new(c, g, rows, cols, &err), &err);
    for (int64_t i = 0; i < rows * cols; i++)
        c->code[i] = (uint8_t)(next(rng) >> 20 & ((1u << g->bits) - 1));
    for (int64_t i = 0; i < rows * (cols / g->group) && g->zeros; i++)
        c->zero[i] = (uint8_t)(next(rng) >> 20 & ((1u << g->bits) - 1));
    for (int64_t i = 0; i < rows * (cols / g->group); i++)
        c->scale[i] = (float)((int)(next(rng) >> 20 & 255) - 100) / 64.0F; /* of either sign, exact in every type */
}

static void formats_go_there_and_back(void **state)
{
    (void)state;
    uint64_t rng = 4;
    const int64_t rows = 64, cols = 96;
    const moec_qformat *f;
    for (size_t k = 0; (f = moec_qformat_at(k)) != NULL; k++) {
        assert_ptr_equal(moec_qformat_find(f->name), f);
        for (int way = 2; way < 18 && !f->dense && !f->nested; way++) { /* nested: test_nested.c */
            const int bits = way / 2;
            const bool zeros = way % 2 == 1;
            if (!(f->widths >> bits & 1) || (zeros && !f->zeros))
                continue;
            const moec_qgrid g = {.bits = bits, .group = 32, .zeros = zeros,
                                  .scale_type = f->scale_type == MOEC_F16 ? MOEC_F16 : MOEC_BF16};
            moec_qcodes c, back;
            moec_piece piece[MOEC_PIECES];
            moec_tensor t[MOEC_PIECES];
            const moec_tensor *at[MOEC_PIECES];
            void *data[MOEC_PIECES] = {NULL};
            moec_err err = {MOEC_OK, ""};
            random_codes(&c, &g, rows, cols, &rng);
            must(moec_qcodes_new(&back, &g, rows, cols, &err), &err);
            const int n = f->pieces(piece, &g, rows, cols);
            for (int i = 0; i < n; i++) {
                t[i] = (moec_tensor){.dtype = piece[i].dtype, .rank = piece[i].rank, .bytes = (size_t)moec_dtypes[piece[i].dtype].bytes};
                for (int d = 0; d < t[i].rank; d++)
                    t[i].bytes *= (size_t)(t[i].dim[d] = piece[i].dim[d]);
                must(moec_alloc(&data[i], t[i].bytes, 1, &err), &err);
                t[i].data = data[i];
                at[i] = &t[i];
            }
            f->write(data, &c);
            must(f->read(&back, (const void *const *)data, &err), &err);
            assert_memory_equal(back.code, c.code, (size_t)(rows * cols));
            assert_memory_equal(back.scale, c.scale, (size_t)(rows * cols / 32) * sizeof *c.scale);
            if (zeros)
                assert_memory_equal(back.zero, c.zero, (size_t)(rows * cols / 32));
            const moec_weight w = moec_qformat_view(f, at, &g, rows, cols);
            float want[96], got[96];
            must(moec_weight_check(&w, &err), &err);
            for (int64_t r = 0; r < rows; r++) {
                moec_weight_read(got, cols, &w, r, 1, 0, cols);
                for (int64_t i = 0; i < cols; i++)
                    want[i] = c.scale[r * 3 + i / 32] * ((float)c.code[r * cols + i] - moec_quant_zero(&c, r * 3 + i / 32));
                assert_memory_equal(got, want, sizeof want);
            }
            const bool bare = strcmp(piece[n - 1].suffix, "scales") == 0; /* no order of columns */
            ((unsigned char *)data[bare ? 1 : n - 1])[0] ^= 1; /* zero points; order; shape */
            assert_int_equal(f->read(&back, (const void *const *)data, &err), zeros ? MOEC_OK : MOEC_EFORMAT);
            for (int i = 0; i < n; i++)
                moec_free(data[i]);
            moec_qcodes_release(&c);
            moec_qcodes_release(&back);
        }
    }
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_qformat_take(&f, "gtpq", &err), MOEC_EINVAL);
    assert_non_null(strstr(err.text, "did you mean gptq"));
    assert_non_null(strstr(err.text, "and gguf"));
}

/* Groups halve as far as a format goes; in dense files whole rows come next, but for those who asked for fewer columns. */
static void groups_of_a_format(void **state)
{
    static const struct {
        const char *format;
        int64_t asked, cols, want;
    } known[] = {{"gptq", 64, 96, 32}, {"gptq", 64, 66, 0}, {"fake", 64, 96, 32}, {"fake", 64, 65, 65}, {"fake", 64, 66, 66}, {"fake", 4, 66, 2}};
    (void)state;
    for (size_t k = 0; k < sizeof known / sizeof *known; k++) {
        const moec_plan_quant q = {.group = known[k].asked, .scale_type = MOEC_F32};
        assert_int_equal(moec_qformat_grid(moec_qformat_find(known[k].format), &q, known[k].cols, 3).group, known[k].want);
    }
}

/* --- plans ----------------------------------------------------------------------------------------------------------- */

static moec_plan *plan_of(const char *format, const char *bits)
{
    moec_plan *p;
    moec_err err = {MOEC_OK, ""};
    must(moec_plan_new(&p, model, "uniform", print.hex, &err), &err);
    must(moec_plan_keep_all(p, &err), &err);
    const int64_t n = 3 * p->n_layers * model->dims.experts;
    snprintf(p->quant.format, sizeof p->quant.format, "%s", format);
    p->quant.group = 32;
    p->quant.scale_type = MOEC_F16;
    must(MOEC_NEW(p->quant.expert, (size_t)n, &err), &err);
    for (int64_t i = 0; i < n; i++)
        p->quant.expert[i] = (uint8_t)(bits[(size_t)i % strlen(bits)] == 'x' ? 16 : bits[(size_t)i % strlen(bits)] - '0');
    const moec_qformat *f = moec_qformat_find(format);
    if (f)
        moec_qformat_mark(p, f);
    return p;
}

static void add_others(moec_plan *p, int bits)
{
    moec_err err = {MOEC_OK, ""};
    moec_plan_quant *q = &p->quant;
    q->n_mat_layers = model->dims.layers;
    must(MOEC_NEW(q->mat, (size_t)q->n_mat_layers * MOEC_MAT_COUNT, &err), &err);
    for (int64_t i = 0; i < q->n_mat_layers * MOEC_MAT_COUNT; i++)
        if (moec_qformat_takes(moec_qformat_find(q->format), q, &model->layer[i / MOEC_MAT_COUNT], (moec_mat)(i % MOEC_MAT_COUNT)))
            q->mat[i] = (uint8_t)bits;
}

static void plans_say_it(void **state)
{
    (void)state;
    open_new("qwen3_moe");
    moec_plan *p = plan_of("gptq", "23484"), *back;
    moec_err err = {MOEC_OK, ""};
    char *text, *again;
    add_others(p, 8);
    must(MOEC_NEW(p->quant.error, 3 * (size_t)p->n_layers, &err), &err);
    p->quant.error[1] = 0.25;
    must(moec_plan_to_text(&text, p, &err), &err);
    assert_non_null(strstr(text, "\"kind\": \"quantize\""));
    must(moec_plan_parse(&back, text, strlen(text), "plan", &err), &err);
    const size_t n = 3 * (size_t)(p->n_layers * model->dims.experts);
    assert_memory_equal(back->quant.expert, p->quant.expert, n);
    assert_memory_equal(back->quant.mat, p->quant.mat, (size_t)p->quant.n_mat_layers * MOEC_MAT_COUNT);
    assert_true(back->quant.error[1] == 0.25 && back->quant.group == 32 && !back->quant.zeros && back->quant.scale_type == MOEC_F16);
    must(moec_plan_to_text(&again, back, &err), &err);
    assert_string_equal(text, again);
    static const struct { const char *was, *is, *says; } edits[] = {
        {"\"group_size\": 32", "\"group_size\": -1", "group_size is -1"},
        {"\"scale_dtype\": \"f16\"", "\"scale_dtype\": \"f8\"", "scale_dtype is f8"},
        {"\"zero_points\": false", "\"zero_points\": 0", "zero_points is not"},
        {"\"bits\": [[2, 3, 4]", "\"bits\": [[2, 3]", "expert 0 has no width"},
        {"\"bits\": [[2, 3, 4]", "\"bits\": [9", "expert 0 has no width"},
        {"\"bits\": [[2, 3, 4], ", "\"bits\": [", "is not a list of 8 widths"},
        {"\"q\": 8", "\"router\": 8", "router is no matrix"},
        {"\"q\": 8", "\"q\": 300", "q is no width"},
        {"\"quant\": {", "\"quant\": {\"extra\": 1, ", "unknown key extra"},
        {"\"format\": \"gptq\"", "\"format\": \"\"", "format is empty"}};
    for (size_t i = 0; i < MOEC_COUNT(edits); i++) {
        char *edited;
        moec_plan *none = NULL;
        const char *at = strstr(text, edits[i].was);
        assert_non_null(at);
        must(moec_format(&edited, &err, "%.*s%s%s", (int)(at - text), text, edits[i].is, at + strlen(edits[i].was)), &err);
        err = (moec_err){MOEC_OK, ""};
        assert_int_equal(moec_plan_parse(&none, edited, strlen(edited), "plan", &err), MOEC_EFORMAT);
        if (!strstr(err.text, edits[i].says))
            fail_msg("%s: %s", edits[i].is, err.text);
        moec_free(edited);
    }
    moec_free(text);
    moec_free(again);
    moec_plan_free(p);
    moec_plan_free(back);
}

static void refused(moec_plan *p, const char *text)
{
    moec_err err = {MOEC_OK, ""};
    if (moec_qformat_check(p, model, &err) == MOEC_OK || !strstr(err.text, text))
        fail_msg("expected \"%s\", got \"%s\"", text, err.text);
    moec_plan_free(p);
}

static void what_does_not_load_is_refused(void **state)
{
    (void)state;
    moec_plan *p;
    moec_err err = {MOEC_OK, ""};
    open_new("qwen3_moe");
    refused(plan_of("nothing", "4"), "none that is known");
    refused(plan_of("gptq", "5"), "5 bits, which gptq has not");
    refused(plan_of("gptq-server", "4444444444448"), "one width for all experts of a layer");
    refused(plan_of("compressed-tensors", "34"), "one width for all experts of the model");
    refused(plan_of("compressed-tensors", "x"), "no expert is quantized");
    p = plan_of("gptq", "4");
    p->quant.scale_type = MOEC_F32;
    refused(p, "scale_dtype is f32, format gptq has f16");
    p = plan_of("gptq-dynamic", "4");
    p->quant.zeros = true;
    refused(p, "without zero points");
    p = plan_of("gptq", "4");
    p->quant.group = 0; /* whole rows: 64 columns of gate and up, 32 of down */
    must(moec_qformat_check(p, model, &err), &err);
    moec_plan_free(p);
    p = plan_of("compressed-tensors", "4");
    p->quant.group = 64;
    refused(p, "--group-size 32");
    p = plan_of("fake", "1");
    p->layer[0].rewritten = 0;
    refused(p, "goes with gate, up and down in \"rewritten\"");
    must(moec_qformat_check(p = plan_of("fake", "1x7"), model, &err), &err);
    moec_plan_free(p);
    must(moec_qformat_check(p = plan_of("fake", "x"), model, &err), &err); /* nothing is computed */
    assert_int_equal(p->layer[0].rewritten, 0);
    p->layer[0].rewritten = MOEC_PART_GATE | MOEC_PART_UP | MOEC_PART_DOWN;
    refused(p, "goes with nothing in \"rewritten\"");
    open_new("granitemoe");
    refused(plan_of("gptq", "4"), "--format fake");
    open_new("qwen3_moe");
    p = plan_of("gptq", "4");
    p->layer[0].n_keep--;
    p->weights[0] = 'x';
    assert_int_equal(moec_plan_check(p, model, print.hex, &err), MOEC_EFORMAT);
    moec_plan_free(p);
}

/* --- outputs --------------------------------------------------------------------------------------------------------- */

/* Random codes of all that the plan quantizes, in a packed format; *sum: of the restored values of the last layer's first expert. */
static void make_weights(moec_override **weights, moec_plan *p)
{
    moec_err err = {MOEC_OK, ""};
    uint64_t rng = 9;
    moec_digest digest;
    must(moec_override_open(weights, work, true, &err), &err);
    for (int64_t l = 0; l < model->dims.layers; l++) {
        moec_qmatrices q;
        char file[64];
        must(moec_qmatrices_of(&q, model, p, l, &err), &err);
        for (size_t i = 0; i < q.n; i++) {
            moec_piece piece[MOEC_PIECES];
            moec_tensor t[MOEC_PIECES];
            void *data[MOEC_PIECES];
            char name[MOEC_PIECES][128];
            moec_sheet *s;
            moec_qcodes c;
            const moec_weight *w = q.at[i].source;
            const int n = q.format->pieces(piece, &q.at[i].grid, w->rows, w->cols);
            for (int k = 0; k < n; k++) {
                snprintf(name[k], sizeof name[k], "%s.%s", q.at[i].module, piece[k].suffix);
                t[k] = (moec_tensor){.name = name[k], .dtype = piece[k].dtype, .rank = piece[k].rank,
                                     .bytes = (size_t)moec_dtypes[piece[k].dtype].bytes};
                for (int d = 0; d < t[k].rank; d++)
                    t[k].bytes *= (size_t)(t[k].dim[d] = piece[k].dim[d]);
            }
            snprintf(file, sizeof file, "m-%d-%zu.safetensors", (int)l, i);
            must(moec_sheet_new(&s, *weights, file, t, (size_t)n, &err), &err);
            for (int k = 0; k < n; k++)
                data[k] = (void *)(uintptr_t)moec_sheet_at(s, (size_t)k)->data;
            random_codes(&c, &q.at[i].grid, w->rows, w->cols, &rng);
            q.format->write(data, &c);
            moec_qcodes_release(&c);
            must(moec_sheet_commit(s, *weights, &err), &err);
        }
        moec_qmatrices_release(&q);
    }
    must(moec_preview_digest(&digest, p, *weights, &err), &err);
    snprintf(p->weights, sizeof p->weights, "%s", digest.hex);
}

/* Every matrix of the opened output is that of the preview. */
static void same_as_preview(const moec_model *made, const moec_plan *p, const moec_override *weights)
{
    static float a[64 * 64], b[64 * 64];
    moec_err err = {MOEC_OK, ""};
    moec_preview v;
    must(moec_preview_new(&v, model, p, weights, &err), &err);
    for (int64_t l = 0; l < model->dims.layers; l++) {
        const moec_layer *x = &made->layer[l], *y = &v.variant->model.layer[l];
        for (int64_t k = 0; x->expert && k < 3 * model->dims.experts; k++) {
            const moec_mlp *e = &x->expert[k / 3], *f = &y->expert[k / 3];
            const moec_weight *w = k % 3 == 0 ? &e->gate : k % 3 == 1 ? &e->up : &e->down;
            const moec_weight *u = k % 3 == 0 ? &f->gate : k % 3 == 1 ? &f->up : &f->down;
            assert_int_equal(w->bits, p->quant.expert[model->layer[l].moe_index * 3 * model->dims.experts + k] % 16);
            moec_weight_read(a, w->cols, w, 0, w->rows, 0, w->cols);
            moec_weight_read(b, u->cols, u, 0, u->rows, 0, u->cols);
            assert_memory_equal(a, b, (size_t)(w->rows * w->cols) * sizeof *a);
        }
    }
    moec_preview_release(&v);
}

static uint64_t problems(const char *text)
{
    moec_verify_report *r;
    moec_err err = {MOEC_OK, ""};
    const moec_verify_options o = {.source = model, .data = true};
    must(moec_verify(&r, out, &o, &err), &err);
    bool said = !text;
    for (uint64_t i = 0; i < r->problems && i < MOEC_VERIFY_SHOWN; i++)
        said = said || strstr(r->problem[i], text);
    const uint64_t n = said ? r->problems : UINT64_MAX;
    moec_verify_free(r);
    return n;
}

/* Changes a byte of a tensor of the output. */
static void damage(const char *name, size_t at, unsigned char value)
{
    moec_ckpt *c;
    moec_err err = {MOEC_OK, ""};
    must(moec_ckpt_open(&c, out, &err), &err);
    const moec_tensor *t = moec_ckpt_find(c, name);
    assert_non_null(t);
    const size_t i = (size_t)(t - moec_ckpt_at(c, 0)), s = moec_ckpt_shard_of(c, i);
    char *path = tiny_path(out, moec_ckpt_shard_name(c, s));
    const int fd = open(path, O_WRONLY);
    assert_int_equal(pwrite(fd, &value, 1, (off_t)(moec_ckpt_offset(c, i) + at)), 1);
    close(fd);
    moec_free(path);
    moec_ckpt_close(c);
}

static void written(const char *family, const char *format, const char *bits, int others, const char *tensor)
{
    moec_err err = {MOEC_OK, ""};
    moec_override *weights;
    moec_apply_result r;
    moec_model *made;
    moec_layout dry;
    open_new(family);
    moec_plan *p = plan_of(format, bits);
    if (others)
        add_others(p, others);
    must(moec_layout_build(&dry, model, p, NULL, &err), &err);
    make_weights(&weights, p);
    const moec_apply_options o = {.out = out, .weights = weights};
    must(moec_apply(&r, model, p, &o, &err), &err);
    assert_int_equal(r.output_bytes, dry.tensor_bytes);
    must(moec_model_open(&made, out, &err), &err);
    assert_int_equal(moec_ckpt_bytes(made->ckpt), dry.tensor_bytes);
    assert_true(made->packed);
    same_as_preview(made, p, weights);
    moec_sizes before, after;
    must(moec_model_sizes(&before, model, &err), &err);
    must(moec_model_sizes(&after, made, &err), &err);
    assert_true(before.total == after.total && before.routed == after.routed && before.active == after.active);
    assert_int_equal(problems(NULL), 0);
    moec_plan *whole; /* codes cannot be cut */
    moec_digest of;
    must(moec_ckpt_fingerprint(&of, made->ckpt, &err), &err);
    must(moec_plan_whole(&whole, made, &err), &err);
    must(moec_plan_check(whole, made, of.hex, &err), &err);
    whole->layer[0].n_keep--;
    assert_int_equal(moec_plan_check(whole, made, of.hex, &err), MOEC_EFORMAT);
    if (!strstr(err.text, "the model is quantized"))
        fail_msg("%s", err.text);
    moec_plan_free(whole);
    assert_non_null(moec_ckpt_find(made->ckpt, tensor));
    moec_model_close(made);
    moec_layout_release(&dry);
    moec_override_close(weights);
    moec_plan_free(p);
}

static void outputs_open_and_verify(void **state)
{
    (void)state;
    written("qwen3_moe", "gptq", "23484", 8, "model.layers.1.mlp.experts.3.up_proj.qweight");
    damage("model.layers.1.mlp.experts.3.up_proj.scales", 1, 0x7c); /* infinite, or nearly: its upper byte */
    assert_true(problems("hash") > 0);
    damage("model.layers.1.mlp.experts.3.up_proj.qzeros", 0, 0x10);
    assert_true(problems("zero point is not the middle") != UINT64_MAX || problems("NaN or infinite") != UINT64_MAX);
    written("qwen3_moe", "gptq-dynamic", "23484", 0, "model.layers.1.mlp.experts.3.up_proj.g_idx");
    damage("model.layers.1.mlp.experts.3.up_proj.g_idx", 0, 1);
    assert_true(problems("not of neighbouring columns") != UINT64_MAX);
    written("mixtral", "gptq", "2x8", 0, "model.layers.0.mlp.experts.0.up_proj.weight"); /* what is left goes by the new names, too */
    written("mixtral", "gptq-server", "4", 0, "model.layers.0.mlp.experts.7.down_proj.g_idx");
    written("mixtral", "compressed-tensors", "5", 4, "model.layers.0.block_sparse_moe.experts.7.w3.weight_packed");
    written("deepseek_v3", "compressed-tensors", "3", 0, "model.layers.1.mlp.experts.0.gate_proj.weight_shape");
    damage("model.layers.1.mlp.experts.0.gate_proj.weight_shape", 0, 1);
    assert_true(problems("its codes are") != UINT64_MAX);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(groups_of_a_format),
        cmocka_unit_test(views_are_read_bit_by_bit), cmocka_unit_test(formats_go_there_and_back), cmocka_unit_test(plans_say_it),
        cmocka_unit_test(what_does_not_load_is_refused), cmocka_unit_test(outputs_open_and_verify)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
