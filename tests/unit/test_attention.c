/* Attention of one sequence against a plain double-precision computation, under every bound, with sinks and tiled keys; and the
 * rotary tables that depend on length, on alpha, or come in other dialects of config.json. */
#include "base/mem.h"
#include "model/forward_parts.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { LENGTH = 150, HEADS = 6, KV = 2, D = 20, DV = 12 };

static float draw(uint32_t *seed)
{
    *seed = *seed * 1664525U + 1013904223U;
    return (float)(*seed >> 8) / (float)(1 << 23) - 1.0f;
}

static bool sees(const moec_layer *l, int64_t i, int64_t j)
{
    return j <= i && (l->window == 0 || j > i - l->window) && (l->chunk == 0 || j / l->chunk == i / l->chunk);
}

/* softmax over the keys that query i sees, and the sink. */
static void expected(double *out, const moec_heads *h, const moec_layer *l, int64_t head, int64_t i, double scale)
{
    double w[LENGTH], top = h->sinks ? (double)h->sinks[head] : (double)-INFINITY;
    int64_t from = h->tiled ? head % KV : head / (HEADS / KV);
    for (int64_t j = 0; j < LENGTH; j++) {
        w[j] = 0;
        for (int64_t c = 0; c < D; c++)
            w[j] += (double)h->q[i * h->ldq + head * D + c] * (double)h->k[j * h->ldk + from * D + c];
        w[j] = sees(l, i, j) ? w[j] * scale : (double)-INFINITY;
        top = fmax(top, w[j]);
    }
    double sum = h->sinks ? exp((double)h->sinks[head] - top) : 0;
    for (int64_t j = 0; j < LENGTH; j++)
        sum += w[j] = exp(w[j] - top);
    for (int64_t c = 0; c < DV; c++) {
        out[c] = 0;
        for (int64_t j = 0; j < LENGTH; j++)
            out[c] += w[j] / sum * (double)h->v[j * h->ldv + from * DV + c];
    }
}

static void check(int64_t window, int64_t chunk, bool tiled, bool with_sinks)
{
    enum { PAD = 3 };
    uint32_t seed = 5;
    float *q, *k, *v, *out, sinks[HEADS];
    moec_layer l = {.window = window, .chunk = chunk};
    moec_model m = {.dims = {.score_scale = 0.7}};
    moec_forward f = {.m = &m, .layer = &l, .o = {.max_seq = LENGTH}};
    moec_scratch s = {0};
    assert_int_equal(MOEC_NEW(q, LENGTH * (HEADS * D + PAD), NULL), MOEC_OK);
    assert_int_equal(MOEC_NEW(k, LENGTH * (KV * D + PAD), NULL), MOEC_OK);
    assert_int_equal(MOEC_NEW(v, LENGTH * (KV * DV + PAD), NULL), MOEC_OK);
    assert_int_equal(MOEC_NEW(out, LENGTH * (HEADS * DV + PAD), NULL), MOEC_OK);
    assert_int_equal(MOEC_NEW(s.scores_qk, MOEC_QUERIES * (LENGTH + 16), NULL), MOEC_OK);
    for (int64_t i = 0; i < LENGTH * (HEADS * D + PAD); i++)
        q[i] = draw(&seed);
    for (int64_t i = 0; i < LENGTH * (KV * D + PAD); i++)
        k[i] = draw(&seed);
    for (int64_t i = 0; i < LENGTH * (KV * DV + PAD); i++)
        v[i] = draw(&seed);
    for (int i = 0; i < HEADS; i++)
        sinks[i] = 2.0f * draw(&seed);
    const moec_heads h = {.q = q, .k = k, .v = v, .out = out, .ldq = HEADS * D + PAD, .ldk = KV * D + PAD,
                          .ldv = KV * DV + PAD, .ldo = HEADS * DV + PAD, .length = LENGTH, .heads = HEADS, .kv_heads = KV,
                          .head_dim = D, .value_dim = DV, .tiled = tiled, .sinks = with_sinks ? sinks : NULL};
    moec__attend(&f, &s, &h);
    for (int64_t i = 0; i < LENGTH; i++)
        for (int64_t head = 0; head < HEADS; head++) {
            double want[DV];
            expected(want, &h, &l, head, i, 0.7);
            for (int64_t c = 0; c < DV; c++)
                assert_true(fabs((double)out[i * h.ldo + head * DV + c] - want[c]) < 2e-6);
        }
    moec_free(q);
    moec_free(k);
    moec_free(v);
    moec_free(out);
    moec_free(s.scores_qk);
}

static void attention_is_the_plain_sum(void **state)
{
    static const struct { int64_t window, chunk; } bounds[] = {
        {0, 0}, {1, 0}, {16, 0}, {65, 0}, {LENGTH, 0}, {1000, 0}, {0, 1}, {0, 7}, {0, 64}, {0, 100}, {0, 1000}, {30, 40}};
    (void)state;
    for (size_t i = 0; i < MOEC_COUNT(bounds); i++)
        for (int how = 0; how < 4; how++)
            check(bounds[i].window, bounds[i].chunk, how & 1, how & 2);
}

static void pairs_and_halves_turn_the_same_planes(void **state)
{
    const float c[] = {0.6f, 0.0f}, s[] = {0.8f, 1.0f};
    float half[] = {1, 2, 3, 4, 9}, pairs[] = {1, 3, 2, 4, 9};
    (void)state;
    moec__rotate(half, c, s, 2, MOEC_ROTATE_HALF);
    moec__rotate(pairs, c, s, 2, MOEC_ROTATE_PAIRS);
    const float want[] = {1 * 0.6f - 3 * 0.8f, -4, 3 * 0.6f + 1 * 0.8f, 2};
    for (int i = 0; i < 2; i++) {
        assert_true(fabsf(half[i] - want[i]) < 1e-6f && fabsf(half[i + 2] - want[i + 2]) < 1e-6f);
        assert_true(pairs[2 * i] == half[i] && pairs[2 * i + 1] == half[i + 2]);
    }
    assert_true(half[4] == 9.0f && pairs[4] == 9.0f);
}

/* ---- rotary tables --------------------------------------------------------------------------------------------------- */

static moec_status read_rope(moec_rope *out, const char *config, int64_t width, double partial, moec_err *err)
{
    moec_json *o;
    assert_int_equal(moec_json_parse(&o, config, strlen(config), "test", NULL), MOEC_OK);
    moec_status st = moec_rope_read(out, o, width, partial, 10000.0, err);
    moec_json_free(o);
    return st;
}

static moec_rope rope_of(const char *config, int64_t width, double partial)
{
    moec_err err = {MOEC_OK, ""};
    moec_rope r;
    if (read_rope(&r, config, width, partial, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    return r;
}

static void refused(const char *config, const char *why)
{
    moec_err err = {MOEC_OK, ""};
    moec_rope r;
    assert_int_equal(read_rope(&r, config, 8, 0, &err), MOEC_EFORMAT);
    if (!strstr(err.text, why))
        fail_msg("%s, expected %s", err.text, why);
}

#define LISTS "\"short_factor\": [1, 2, 4, 8], \"long_factor\": [1, 4, 16, 64]"

static void longrope_changes_with_the_length(void **state)
{
    double f[4], scale;
    (void)state;
    moec_rope r = rope_of("{\"rope_scaling\": {\"type\": \"su\", " LISTS "}, \"max_position_embeddings\": 4096,"
                          " \"original_max_position_embeddings\": 64}", 8, 0);
    assert_true(moec_rope_by_length(&r));
    moec_rope_table(f, &scale, &r, 64);
    assert_true(fabs(f[1] - 0.1 / 2) < 1e-12 && fabs(f[3] - 0.001 / 8) < 1e-12);
    assert_true(fabs(scale - sqrt(1 + log(64.0) / log(64.0))) < 1e-12); /* factor 4096 / 64 */
    moec_rope_table(f, &scale, &r, 65);
    assert_true(fabs(f[1] - 0.1 / 4) < 1e-12 && fabs(f[3] - 0.001 / 64) < 1e-12);
    r = rope_of("{\"rope_parameters\": {\"rope_type\": \"longrope\", \"short_mscale\": 1.1, \"long_mscale\": 1.2,"
                " \"original_max_position_embeddings\": 64, " LISTS "}}", 8, 0);
    moec_rope_table(f, &scale, &r, 65); /* as transformers runs PhiMoE */
    assert_true(fabs(f[3] - 0.001 / 8) < 1e-12 && scale == 1.2);
    moec_rope_table(f, &scale, &r, 64);
    assert_true(fabs(f[3] - 0.001 / 8) < 1e-12 && scale == 1.1);
}

static void alpha_is_for_any_length(void **state)
{
    double f[4], g[4], scale;
    (void)state;
    moec_rope r = rope_of("{\"rope_scaling\": {\"type\": \"dynamic\", \"alpha\": 1000.0, \"factor\": 1.0}}", 8, 0);
    assert_false(moec_rope_by_length(&r));
    moec_rope_table(f, &scale, &r, 8);
    moec_rope_table(g, &scale, &r, 100000);
    assert_memory_equal(f, g, sizeof f);
    assert_true(fabs(f[1] - pow(10000.0 * pow(1000.0, 8.0 / 6.0), -0.25)) < 1e-12);
    r = rope_of("{\"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2.0}}", 8, 0);
    assert_true(moec_rope_by_length(&r));
}

static void the_rotated_width_comes_from_many_keys(void **state)
{
    (void)state;
    assert_int_equal(rope_of("{}", 64, 0).width, 64);
    assert_int_equal(rope_of("{}", 64, 0.25).width, 16);
    assert_int_equal(rope_of("{\"rotary_dim\": 24}", 64, 0.25).width, 24);
    assert_int_equal(rope_of("{\"partial_rotary_factor\": 0.5, \"rotary_dim\": 24}", 64, 0.25).width, 32);
    assert_int_equal(rope_of("{\"partial_rotary_factor\": 0.5, \"rope_parameters\": {\"partial_rotary_factor\": 0.75}}", 64,
                             0).width, 48);
    assert_int_equal(rope_of("{\"partial_rotary_factor\": 0.334}", 192, 0).width, 64);
    moec_rope r = rope_of("{\"rope_scaling\": {}, \"rope_parameters\": {\"rope_theta\": 77}, \"rope_theta\": 5}", 8, 0);
    assert_true(r.theta == 77.0); /* an empty rope_scaling counts as none */
    r = rope_of("{\"rope_scaling\": {\"mrope_section\": [1, 1, 2], \"type\": \"mrope\"}, \"rope_theta\": 5}", 8, 0);
    assert_true(r.kind == MOEC_ROPE_DEFAULT && r.theta == 5.0);
    r = rope_of("{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 16, \"high_freq_factor\": 1.0,"
                " \"low_freq_factor\": 1.0, \"original_max_position_embeddings\": 8192}}", 8, 0); /* Llama 4 Scout */
    assert_true(r.kind == MOEC_ROPE_LLAMA3);
}

static void layer_types_must_agree(void **state)
{
    (void)state;
    moec_rope r = rope_of("{\"rope_parameters\": {\"full_attention\": {\"rope_theta\": 50, \"rope_type\": \"default\"},"
                          " \"sliding_attention\": {\"rope_type\": \"default\", \"rope_theta\": 50.0}}}", 8, 0);
    assert_true(r.theta == 50.0);
    refused("{\"rope_parameters\": {\"full_attention\": {\"rope_theta\": 50}, \"sliding_attention\": {\"rope_theta\": 60}}}",
            "sliding_attention differs from full_attention");
}

static void bad_numbers_are_refused(void **state)
{
    (void)state;
    refused("{\"rope_scaling\": {\"type\": \"proportional\"}}", "rope type proportional is not known");
    refused("{\"rope_scaling\": {\"type\": \"longrope\"}}", "short_factor has 0 numbers, expected 4");
    refused("{\"rope_scaling\": {\"type\": \"longrope\", \"short_factor\": [1, 2, 3], \"long_factor\": [1, 1, 1, 1]}}",
            "short_factor has 3 numbers");
    refused("{\"rope_scaling\": {\"type\": \"longrope\", \"short_factor\": [1, 2, 3, 0], \"long_factor\": [1, 1, 1, 1]}}",
            "short_factor: number 3 is out of range");
    refused("{\"rope_scaling\": {\"type\": \"longrope\", \"short_factor\": [1, 2, 3, 4], \"long_factor\": [1, \"a\", 1, 1]}}",
            "long_factor: number 1 is out of range");
    refused("{\"rope_scaling\": {\"type\": \"longrope\", \"short_mscale\": 1, " LISTS "}}", "out of range");
    refused("{\"rope_scaling\": {\"type\": \"dynamic\", \"alpha\": -1}}", "out of range");
    refused("{\"rotary_dim\": \"8\"}", "rotary_dim is not a number");
    refused("{\"rotary_dim\": 3}", "rotated width 3 is not even");
    refused("{\"rotary_dim\": 16}", "out of range");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_is_the_plain_sum),
        cmocka_unit_test(pairs_and_halves_turn_the_same_planes),
        cmocka_unit_test(longrope_changes_with_the_length),
        cmocka_unit_test(alpha_is_for_any_length),
        cmocka_unit_test(the_rotated_width_comes_from_many_keys),
        cmocka_unit_test(layer_types_must_agree),
        cmocka_unit_test(bad_numbers_are_refused),
    };
    return cmocka_run_group_tests_name("attention", tests, NULL, NULL);
}
