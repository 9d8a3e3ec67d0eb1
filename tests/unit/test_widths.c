/* Widths by every method of kind MOEC_QUANTIZE on small statistics: against all choices, by hand, and what is refused. */
#include "base/mem.h"
#include "base/random.h"
#include "method/widths.h"
#include "support/tiny.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { E = 8, L = 3, H = 16, I = 12, B = MOEC_QUANT_WIDTHS };

static char *folder, *rule;
static moec_model *model;
static moec_digest print;
static uint64_t state;

static double uniform(void)
{
    state += UINT64_C(0x9e3779b97f4a7c15);
    return (double)(moec_mix64(state) >> 11) * 0x1p-53;
}

static int set_up(void **unused)
{
    (void)unused;
    const tiny_spec spec = {.seed = 5};
    moec_err err = {MOEC_OK, ""};
    folder = tiny_folder();
    if (tiny_write(folder, &spec, &err) != MOEC_OK || moec_model_open(&model, folder, &err) != MOEC_OK ||
        moec_ckpt_fingerprint(&print, model->ckpt, &err) != MOEC_OK || moec_router_rule(&rule, model, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    return 0;
}

static int tear_down(void **unused)
{
    (void)unused;
    moec_model_close(model);
    tiny_remove(folder);
    moec_free(folder);
    moec_free(rule);
    return 0;
}

/* Random statistics; with errors they have what measuring adds. */
static moec_stats *make(bool errors, int domains)
{
    static const char *const names[] = {"text", "code"};
    static int64_t layers[L] = {0, 1, 2};
    static char empty[] = "{}";
    static const double width_error[B] = {1.0, 0.3, 0.07, 0.015, 0.0001};
    moec_stats *s;
    moec_stats_meta meta = {.model_type = "qwen3_moe", .router_rule = rule, .options = empty, .compute = "f32", .layers = L,
                            .moe_layers = L, .experts = E, .top_k = 2, .hidden = H, .expert_width = I, .moe_layer = layers};
    memcpy(meta.model, print.hex, sizeof meta.model);
    assert_int_equal(moec_stats_new(&s, &meta, domains, names, NULL), MOEC_OK);
    for (int d = 0; d < domains; d++) {
        s->domain[d].tokens = 100;
        for (int k = MOEC_STAT_QUANT_SQ; errors && k <= MOEC_STAT_QUANT_KL; k++)
            if (!s->domain[d].data[k])
                assert_int_equal(moec_alloc(&s->domain[d].data[k], L * (size_t)moec_stat_cells(&s->meta, (moec_stat)k), 8, NULL), MOEC_OK);
        for (int l = 0; l < L; l++) {
            ((double *)moec_stat_at(s, d, MOEC_STAT_COS_MOE, l))[0] = 90.0 - 10.0 * (l == 1);
            double *norm = moec_stat_at(s, d, MOEC_STAT_NORMS_RES, l);
            norm[0] = 10.0, norm[1] = 1.0 + l;
            for (int e = 0; e < E; e++) {
                const double scale = exp(3.0 * uniform());
                ((uint64_t *)moec_stat_at(s, d, MOEC_STAT_SELECTED, l))[e] = (uint64_t)(1.0 + 40.0 * uniform());
                ((double *)moec_stat_at(s, d, MOEC_STAT_PROB_SELECTED, l))[e] = 0.1 + 5.0 * uniform();
                for (int b = 0; errors && b < B; b++) {
                    ((double *)moec_stat_at(s, d, MOEC_STAT_QUANT_FRO, l))[e * B + b] = scale * (0.5 + uniform()) * width_error[b];
                    for (int p = 0; p < 4; p++)
                        ((double *)moec_stat_at(s, d, MOEC_STAT_QUANT_SQ, l))[(e * 4 + p) * B + b] =
                            scale * (0.8 + 0.4 * uniform()) * width_error[b] * (p == 3 ? 3.0 : 1.0 + p);
                }
            }
        }
    }
    return s;
}

static moec_request ask;
static const uint64_t sizes[] = {30, 54, 78, 30, 54, 78, 33, 57, 81}; /* gate, up, down at 1, 2, 3 */

static moec_widths_request request(const moec_stats *s, double bits)
{
    ask = (moec_request){.model = model, .fingerprint = print.hex, .stats = s};
    return (moec_widths_request){.q = &ask, .n_widths = 3, .width = {1, 2, 3}, .bytes = sizes, .bits = bits, .alpha = (double)NAN,
                                 .beta = (double)NAN, .gamma = (double)NAN};
}

static moec_status try(moec_widths *w, const char *name, const moec_widths_request *r, moec_err *err)
{
    const moec_method *me = moec_method_find(MOEC_QUANTIZE, name);
    assert_non_null(me);
    *err = (moec_err){MOEC_OK, ""};
    return moec_widths_solve(w, me, r, err);
}

static moec_widths solve(const char *name, const moec_widths_request *r)
{
    moec_widths w;
    moec_err err;
    if (try(&w, name, r, &err) != MOEC_OK)
        fail_msg("%s: %s", name, err.text);
    double bits = 0.0;
    uint64_t bytes = 0;
    for (int c = 0; c < L * E * 3; c++) {
        bits += w.bits[c];
        for (int b = 0; b < r->n_widths; b++)
            bytes += r->width[b] == w.bits[c] ? r->bytes[c % 3 * r->n_widths + b] : 0;
    }
    assert_true(fabs(w.mean - bits / (L * E * 3)) < 1e-12);
    assert_int_equal(w.bytes, bytes);
    return w;
}

static void refuse(moec_status code, const char *says, const char *name, const moec_widths_request *r)
{
    moec_widths w;
    moec_err err;
    const moec_status st = try(&w, name, r, &err);
    assert_null(w.bits);
    if (st != code || !strstr(err.text, says))
        fail_msg("%d, \"%s\": expected %d, \"%s\"", (int)st, err.text, (int)code, says);
}

/* PMQ as its code has it, all 3^8 choices of each layer. */
static void test_pmq(void **unused)
{
    (void)unused;
    state = 1;
    for (int budget = 12; budget <= 20; budget++) {
        moec_stats *s = make(true, 1);
        moec_widths_request r = request(s, budget / 8.0);
        moec_widths w = solve("pmq", &r);
        double sum = 0.0;
        for (int l = 0; l < L; l++) {
            const uint64_t *n = moec_stat_at(s, 0, MOEC_STAT_SELECTED, l);
            const double *p = moec_stat_at(s, 0, MOEC_STAT_PROB_SELECTED, l), *fro = moec_stat_at(s, 0, MOEC_STAT_QUANT_FRO, l);
            double all_n = 0.0, all_p = 0.0, best = (double)INFINITY;
            int pick[E] = {0};
            for (int e = 0; e < E; e++)
                all_n += (double)n[e], all_p += p[e];
            for (int code = 0; code < 6561; code++) {
                int used = 0, has[3] = {0};
                double cost = 0.0;
                for (int e = 0, c = code; e < E; e++, c /= 3) {
                    used += c % 3 + 1;
                    has[c % 3]++;
                    cost += (double)n[e] / all_n * pow(p[e] / all_p, 1.5) * fro[e * B + c % 3];
                }
                if (used > budget || !has[1] || !has[2] || !(cost < best))
                    continue;
                best = cost;
                for (int e = 0, c = code; e < E; e++, c /= 3)
                    pick[e] = c % 3 + 1;
            }
            sum += best;
            for (int c = 0; c < E * 3; c++)
                assert_int_equal(w.bits[l * E * 3 + c], pick[c / 3]);
        }
        assert_true(w.proven && fabs(w.cost - sum) <= 1e-12 * sum && w.bound <= w.cost);
        moec_widths_release(&w);
        moec_stats_free(s);
    }
}

/* Gains move bits to layers whose errors cost most, a domain of weight 0 is as if it were not there, scaled errors change nothing. */
static void test_direct(void **unused)
{
    (void)unused;
    state = 2;
    moec_stats *s = make(true, 1);
    moec_widths_request r = request(s, 2.0);
    moec_widths plain = solve("direct", &r);
    assert_true(plain.mean <= 2.0 && plain.mean > 1.98);
    double *kl = moec_stat_at(s, 0, MOEC_STAT_QUANT_KL, 0);
    kl[0] = 1e-6, kl[1] = 1e-6, kl[2] = 1e3;
    moec_widths w = solve("direct", &r);
    for (int c = 0; c < E * 3; c++)
        assert_int_equal(w.bits[2 * E * 3 + c], 3);
    moec_widths_release(&w);
    kl[0] = kl[1] = kl[2] = 0.0;
    const int fine[] = {MOEC_WIDTHS_PROJECTION, MOEC_WIDTHS_EXPERT, MOEC_WIDTHS_LAYER, MOEC_WIDTHS_MODEL};
    for (size_t i = 0; i < MOEC_COUNT(fine); i++) {
        r.grain = (moec_widths_grain)fine[i];
        w = solve("direct", &r);
        for (int c = 0; c < L * E * 3; c++)
            assert_true(i == 0 || w.bits[c] == w.bits[c / 3 * 3]);
        assert_true(w.mean <= 2.0);
        moec_widths_release(&w);
    }
    r.grain = MOEC_WIDTHS_LAYER_PROJECTION;
    w = solve("direct", &r);
    for (int c = 0; c < L * E * 3; c++)
        assert_int_equal(w.bits[c], w.bits[c / (E * 3) * E * 3 + c % 3]);
    moec_widths_release(&w);

    state = 2;
    moec_stats *two = make(true, 2);
    memcpy(moec_stat_at(two, 0, MOEC_STAT_QUANT_SQ, 0), moec_stat_at(s, 0, MOEC_STAT_QUANT_SQ, 0), L * E * 4 * B * sizeof(double));
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_stats_set_weights(two, "code=0", &err), MOEC_OK);
    r = request(two, 2.0);
    w = solve("direct", &r);
    assert_memory_equal(w.bits, plain.bits, L * E * 3);
    moec_widths_release(&w);
    moec_widths_release(&plain);
    moec_stats_free(two);
    moec_stats_free(s);
}

static void test_bytes(void **unused)
{
    (void)unused;
    state = 3;
    moec_stats *s = make(true, 1);
    moec_widths_request r = request(s, 0.0);
    for (r.budget = 93 * 24; r.budget < 240 * 24; r.budget += 97) {
        static const char *const names[] = {"direct", "pmq", "pmq-paper", "pmq-global", "gemq-like", "frequency", "gptq", "outlier"};
        for (size_t i = 0; i < MOEC_COUNT(names); i++) {
            moec_widths w = solve(names[i], &r);
            assert_true(w.bytes <= r.budget);
            moec_widths_release(&w);
        }
    }
    r.budget = 93 * 24 - 1;
    refuse(MOEC_ENOFIT, "the least that is possible is 2232", "direct", &r);
    refuse(MOEC_ENOFIT, "the least that is possible is 2232", "pmq", &r);
    refuse(MOEC_ENOFIT, "the least that is possible is 2232", "gptq", &r);
    refuse(MOEC_ENOFIT, "the least that is possible is 2232", "frequency", &r);
    moec_stats_free(s);
}

static void test_protected(void **unused)
{
    (void)unused;
    state = 4;
    moec_stats *s = make(true, 1);
    bool flag[L * E] = {false};
    flag[3] = flag[20] = true;
    const moec_guard guard = {L, E, 2, flag};
    static const char *const names[] = {"direct", "pmq", "pmq-global", "gemq-like", "frequency", "first-blocks", "block-importance",
                                        "rtn"};
    for (size_t i = 0; i < MOEC_COUNT(names); i++) {
        moec_widths_request r = request(s, 2.0);
        ask.guard = &guard;
        moec_widths w = solve(names[i], &r);
        for (int p = 0; p < 3; p++) {
            assert_int_equal(w.bits[9 + p], 3);
            assert_int_equal(w.bits[60 + p], 3);
        }
        assert_true(w.mean <= 2.0 || i == 7);
        moec_widths_release(&w);
    }
    moec_widths_request r = request(s, 1.01);
    ask.guard = &guard;
    refuse(MOEC_ENOFIT, "the least that is possible with the experts that are protected is 1.1667", "direct", &r);
    refuse(MOEC_ENOFIT, "the least that is possible with the experts that are protected is 1.2500", "pmq", &r);
    moec_stats_free(s);
}

/* 1.5 bits of 1 and 2: half of the items. */
static void test_ranked(void **unused)
{
    (void)unused;
    state = 5;
    moec_stats *s = make(false, 1);
    uint64_t *n = moec_stat_at(s, 0, MOEC_STAT_SELECTED, 0);
    for (int e = 0; e < L * E; e++)
        n[e] = e % E < 4 ? 3 : 20; /* ties by number */
    moec_widths_request r = request(s, 1.5);
    moec_widths w = solve("frequency", &r);
    for (int c = 0; c < L * E * 3; c++)
        assert_int_equal(w.bits[c], c / 3 % E < 4 ? 1 : 2);
    moec_widths_release(&w);
    w = solve("first-blocks", &r);
    for (int c = 0; c < L * E * 3; c++)
        assert_int_equal(w.bits[c], c / 3 < 12 ? 2 : 1);
    moec_widths_release(&w);
    r.bits = 4.0 / 3.0;
    r.grain = MOEC_WIDTHS_LAYER;
    w = solve("block-importance", &r);
    for (int c = 0; c < L * E * 3; c++)
        assert_int_equal(w.bits[c], c / (3 * E) == 1 ? 2 : 1);
    moec_widths_release(&w);
    r.grain = MOEC_WIDTHS_PROJECTION;
    r.bits = 1.0 + 36.0 / 72.0;
    w = solve("projection", &r);
    for (int c = 0; c < L * E * 3; c++) /* all of down, then half of gate */
        assert_int_equal(w.bits[c], c % 3 == 2 || (c % 3 == 0 && c / 3 < 12) ? 2 : 1);
    moec_widths_release(&w);
    r.grain = MOEC_WIDTHS_EXPERT;
    refuse(MOEC_EINVAL, "method projection tells gate, up and down apart; here widths are chosen by expert", "projection", &r);
    r.grain = MOEC_WIDTHS_LAYER;
    refuse(MOEC_EINVAL, "method frequency tells experts apart", "frequency", &r);
    moec_stats_free(s);
}

static void test_outlier(void **unused)
{
    (void)unused;
    double best = 0.0, score[L * E];
    for (int i = 0; i < L * E; i++) {
        const moec_mlp *x = &model->layer[i / E].expert[i % E];
        const moec_weight *const part[] = {&x->gate, &x->up, &x->down};
        score[i] = 0.0;
        for (int p = 0; p < 3; p++) {
            double got, want = 0.0;
            assert_int_equal(moec_widths_outlier(&got, part[p], NULL), MOEC_OK);
            for (int64_t c = 0; c < part[p]->cols; c++) {
                double sum = 0.0, most = 0.0;
                for (int64_t row = 0; row < part[p]->rows; row++) {
                    float v;
                    moec_weight_read(&v, 1, part[p], row, 1, c, 1);
                    sum += fabs((double)v);
                    most = fmax(most, fabs((double)v));
                }
                want = fmax(want, sum > 0.0 ? most / (sum / (double)part[p]->rows) : 0.0);
            }
            assert_true(fabs(got - want) <= 1e-12 * want);
            score[i] = fmax(score[i], want);
        }
        best = fmax(best, score[i]);
    }
    moec_widths_request r = request(NULL, 1.0 + 1.0 / 24.0);
    moec_widths w = solve("outlier", &r);
    for (int i = 0; i < L * E; i++)
        if (w.bits[3 * i] == 2)
            assert_true(score[i] >= best * (1.0 - 1e-12));
    assert_true(fabs(w.mean - r.bits) < 1e-12);
    moec_widths_release(&w);
}

static void test_uniform(void **unused)
{
    (void)unused;
    static const struct { const char *name; moec_rounding rounding; } rows[] = {
        {"rtn", MOEC_ROUND_NEAREST}, {"clip", MOEC_ROUND_CLIP}, {"gptq", MOEC_ROUND_GPTQ}, {"direct", MOEC_ROUND_GPTQ}};
    for (size_t i = 0; i < MOEC_COUNT(rows); i++)
        assert_int_equal(moec_widths_rounding(moec_method_find(MOEC_QUANTIZE, rows[i].name)), rows[i].rounding);
    moec_widths_request r = request(NULL, 2.0);
    moec_widths w = solve("rtn", &r);
    assert_true(isnan(w.cost) && isnan(w.bound) && fabs(w.mean - 2.0) < 1e-12);
    moec_widths_release(&w);
    r.bits = 2.5;
    refuse(MOEC_EINVAL, "--bits 2.5: method gptq has one width, of 1, 2, 3; 2 and 3 are nearest", "gptq", &r);
    r.bits = 0.5;
    refuse(MOEC_ENOFIT, "the least that is possible is 1", "gptq", &r);
    r.bits = 4.0;
    refuse(MOEC_EINVAL, "--bits 4: the widths to choose from are 1, 2, 3", "gptq", &r);
    r.bits = 0.0;
    refuse(MOEC_EINVAL, "give either", "gptq", &r);
    r.bits = 2.0, r.budget = 5;
    refuse(MOEC_EINVAL, "give either", "gptq", &r);
}

static void test_refused(void **unused)
{
    (void)unused;
    state = 6;
    moec_stats *none = make(false, 1), *s = make(true, 1);
    moec_widths_request r = request(none, 2.0);
    refuse(MOEC_EFORMAT, "statistics without quantization errors", "direct", &r);
    refuse(MOEC_EFORMAT, "calibrate --errors adds them", "pmq", &r);
    r = request(NULL, 2.0);
    refuse(MOEC_EINVAL, "method direct needs statistics", "direct", &r);
    r = request(s, 2.0);
    r.grain = MOEC_WIDTHS_PROJECTION;
    refuse(MOEC_EINVAL, "method pmq knows errors of whole experts", "pmq", &r);
    r.grain = MOEC_WIDTHS_EXPERT;
    r.width[2] = 5;
    refuse(MOEC_EFORMAT, "statistics without errors at 5 bits", "direct", &r);
    r.width[2] = 2;
    refuse(MOEC_EINVAL, "ascending", "direct", &r);
    r.width[2] = 16; /* as it is: no error */
    r.bits = 16.0;
    moec_widths w = solve("direct", &r);
    for (int c = 0; c < L * E * 3; c++)
        assert_int_equal(w.bits[c], 16);
    assert_true(!(w.cost > 0.0));
    moec_widths_release(&w);
    r = request(s, 0.9);
    refuse(MOEC_ENOFIT, "--bits 0.9: the least that is possible is 1.0000", "direct", &r);
    ((double *)moec_stat_at(s, 0, MOEC_STAT_QUANT_SQ, 0))[5] = (double)INFINITY;
    r = request(s, 2.0);
    r.grain = MOEC_WIDTHS_PROJECTION;
    refuse(MOEC_ENUMERIC, "", "direct", &r);
    moec_stats_free(none);
    moec_stats_free(s);
    s = make(true, 1);
    memset(moec_stat_at(s, 0, MOEC_STAT_QUANT_SQ, 0), 0, L * E * 4 * B * sizeof(double));
    r = request(s, 2.0);
    refuse(MOEC_EFORMAT, "calibrate --errors adds them", "direct", &r);
    moec_stats_free(s);
}

/* Rows that no choice has are left out: all at 1 bit is all that fits. */
static void test_rows(void **unused)
{
    (void)unused;
    state = 7;
    moec_stats *s = make(true, 1);
    moec_widths_request r = request(s, 1.0);
    moec_widths w = solve("pmq", &r);
    assert_true(fabs(w.mean - 1.0) < 1e-12);
    moec_widths_release(&w);
    r.bits = 11.0 / 8.0; /* 6 of 1 bit, one of 2, one of 3 */
    w = solve("pmq", &r);
    for (int l = 0; l < L; l++) {
        int has[4] = {0};
        for (int e = 0; e < E; e++)
            has[w.bits[(l * E + e) * 3]]++;
        assert_true(has[1] == 6 && has[2] == 1 && has[3] == 1);
    }
    moec_widths_release(&w);
    moec_stats_free(s);
}

static void test_no_memory(void **unused)
{
    (void)unused;
    state = 8;
    moec_stats *s = make(true, 1);
    static const char *const names[] = {"direct", "pmq", "outlier", "gptq"};
    for (size_t i = 0; i < MOEC_COUNT(names); i++) {
        moec_widths_request r = request(s, 2.0);
        moec_status st;
        for (long k = 0;; k++) {
            moec_widths w;
            moec_err err;
            moec_test_allocs_left = k;
            st = try(&w, names[i], &r, &err);
            moec_test_allocs_left = __LONG_MAX__;
            moec_widths_release(&w);
            if (st != MOEC_ENOMEM)
                break;
        }
        assert_int_equal(st, MOEC_OK);
    }
    moec_stats_free(s);
}

/* It makes no plan of experts that are kept. */
static void test_no_plan(void **unused)
{
    (void)unused;
    moec_plan *p;
    moec_err err = {MOEC_OK, ""};
    (void)request(NULL, 2.0);
    assert_int_equal(moec_method_plan(&p, MOEC_QUANTIZE, "gptq", &ask, &err), MOEC_EINVAL);
    assert_non_null(strstr(err.text, "method gptq chooses widths"));
}

static void test_table(void **unused)
{
    (void)unused;
    const moec_method *m;
    int n = 0, defaults = 0;
    for (size_t i = 0; (m = moec_method_at(i)) != NULL; i++)
        if (m->kind == MOEC_QUANTIZE) {
            assert_true(m->brief && m->paper && m->formula && m->row);
            assert_ptr_equal(moec_method_find(MOEC_QUANTIZE, m->name), m);
            defaults += m->is_default;
            n++;
        }
    assert_int_equal(n, 13);
    assert_int_equal(defaults, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pmq),     cmocka_unit_test(test_direct),  cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_protected), cmocka_unit_test(test_ranked), cmocka_unit_test(test_outlier),
        cmocka_unit_test(test_uniform), cmocka_unit_test(test_refused), cmocka_unit_test(test_rows),
        cmocka_unit_test(test_no_memory), cmocka_unit_test(test_no_plan), cmocka_unit_test(test_table),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
