/* What the newer prune methods compute, on numbers small enough to do by hand: NLLB's importance, scores from routers and weights,
 * clusters, how a total is shared out over layers, nested plans, and who is a super expert; and what they refuse. */
#include "base/mem.h"
#include "base/par.h"
#include "method/cluster.h"
#include "method/method.h"
#include "support/tiny.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { E = 8, L = 3 };

typedef struct place {
    char *folder;
    moec_model *model;
    moec_digest print;
} place;
static place at, other; /* of one shape, with other weights */
static char *rule;

static void open_place(place *p, const tiny_spec *spec)
{
    moec_err err = {MOEC_OK, ""};
    p->folder = tiny_folder();
    if (tiny_write(p->folder, spec, &err) != MOEC_OK || moec_model_open(&p->model, p->folder, &err) != MOEC_OK ||
        moec_ckpt_fingerprint(&p->print, p->model->ckpt, &err) != MOEC_OK)
        fail_msg("%s", err.text);
}

static void close_place(place *p)
{
    moec_model_close(p->model);
    tiny_remove(p->folder);
    moec_free(p->folder);
}

static int set_up(void **state)
{
    (void)state;
    const tiny_spec one = {.seed = 5}, two = {.seed = 6};
    open_place(&at, &one);
    open_place(&other, &two);
    return moec_router_rule(&rule, at.model, NULL) == MOEC_OK ? 0 : 1;
}

static int tear_down(void **state)
{
    (void)state;
    close_place(&at);
    close_place(&other);
    moec_free(rule);
    return 0;
}

static moec_stats *make(void)
{
    static const char *const names[] = {"text"};
    static int64_t layers[L] = {0, 1, 2};
    static char empty[] = "{}";
    moec_stats *s;
    moec_stats_meta meta = {.model_type = "qwen3_moe", .router_rule = rule, .options = empty, .compute = "f32", .layers = L,
                            .moe_layers = L, .experts = E, .top_k = 2, .hidden = 16, .expert_width = 12, .moe_layer = layers};
    memcpy(meta.model, at.print.hex, sizeof meta.model);
    assert_int_equal(moec_stats_new(&s, &meta, 1, names, NULL), MOEC_OK);
    s->domain[0].tokens = 10;
    return s;
}

static moec_request request(const moec_stats *s, int64_t keep)
{
    return (moec_request){.model = at.model, .fingerprint = at.print.hex, .stats = s, .keep = keep, .lambda1 = 1.0};
}

static moec_plan *plan(const char *method, const moec_request *q)
{
    moec_plan *p;
    moec_err err = {MOEC_OK, ""};
    if (moec_method_plan(&p, MOEC_PRUNE, method, q, &err) != MOEC_OK)
        fail_msg("%s: %s", method, err.text);
    return p;
}

static void refuse(const char *method, const moec_request *q, moec_status code, const char *says)
{
    moec_plan *p;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_method_plan(&p, MOEC_PRUNE, method, q, &err), code);
    assert_null(p);
    if (!strstr(err.text, says))
        fail_msg("\"%s\" does not say \"%s\"", err.text, says);
}

static void near_to(double got, double want)
{
    if (!(fabs(got - want) <= 1e-12 * fabs(want)))
        fail_msg("%.17g, expected %.17g", got, want);
}

/* 10 tokens; e is the first choice of n of them with weights that sum to g. */
static void test_nllb(void **state)
{
    (void)state;
    static const struct { uint64_t n; double g, score; } rows[E] = {
        {4, 2.0, 0.65948850828005128} /* .4 e^.5 */, {1, 1.0, 0.27182818284590452} /* .1 e */, {0, 0.0, 0.0},
        {2, 0.5, 0.25680508333754830} /* .2 e^.25 */, {3, 0.0, 0.3}};
    moec_stats *s = make();
    uint64_t *rank = moec_stat_at(s, 0, MOEC_STAT_RANK, 1);
    double *gate = moec_stat_at(s, 0, MOEC_STAT_GATE_TOP1_SUM, 1);
    for (int e = 0; e < E; e++) {
        rank[2 * e] = rows[e].n;
        rank[2 * e + 1] = 7; /* second choices say nothing */
        gate[e] = rows[e].g;
    }
    moec_request q = request(s, 4);
    moec_plan *p = plan("nllb", &q);
    for (int e = 0; e < E; e++)
        near_to(p->layer[1].score[e], rows[e].score);
    assert_int_equal(p->layer[1].keep[2], 3);
    moec_plan_free(p);
    moec_stats_free(s);
}

/* A marker below 0 ranks below an expert that never was the first choice. */
static void test_negative_logits(void **state)
{
    (void)state;
    moec_stats *s = make();
    double *marker = moec_stat_at(s, 0, MOEC_STAT_MARKER_TOP1, 0);
    for (int e = 0; e < E; e++)
        marker[e] = e - 3;
    moec_request q = request(s, 4);
    moec_plan *p = plan("tcess", &q);
    near_to(p->layer[0].score[0], -0.3);
    assert_int_equal(p->layer[0].keep[0], 4);
    moec_plan_free(p);
    q.allocation = MOEC_ALLOCATE_GLOBAL;
    refuse("tcess", &q, MOEC_EINVAL, "method tcess has scores below 0 (layer 0, expert 0: -0.3)");
    moec_stats_free(s);
}

static double read(const moec_weight *w, int64_t r, int64_t c)
{
    float v;
    moec_weight_read(&v, 1, w, r, 1, c, 1);
    return (double)v;
}

static void test_router(void **state)
{
    (void)state;
    moec_request q = request(NULL, 4);
    q.base = other.model;
    q.base_print = other.print.hex;
    moec_plan *norm = plan("router-norm", &q), *change = plan("router-change", &q), *row = plan("router-row", &q);
    assert_non_null(strstr(norm->options, other.print.hex));
    for (int64_t l = 0; l < L; l++)
        for (int64_t e = 0; e < E; e++) {
            double a = 0.0, b = 0.0, d = 0.0;
            for (int64_t c = 0; c < 16; c++) {
                const double w = read(at.model->set[l].router, e, c), v = read(other.model->set[l].router, e, c);
                a += w * w;
                b += v * v;
                d += (w - v) * (w - v);
            }
            near_to(norm->layer[l].score[e], sqrt(a) - sqrt(b));
            near_to(change->layer[l].score[e], sqrt(d));
            near_to(row->layer[l].score[e], sqrt(a));
        }
    moec_plan_free(norm);
    moec_plan_free(change);
    moec_plan_free(row);
}

static void test_router_refusals(void **state)
{
    (void)state;
    moec_request q = request(NULL, 4);
    refuse("router-norm", &q, MOEC_EINVAL, "--base DIR is missing");
    q.base = at.model;
    refuse("router-change", &q, MOEC_EFORMAT, "24 of 24 differences of router rows are exactly 0");
    static const struct { tiny_spec spec; const char *says; } rows[] = {
        {{.seed = 1, .experts = 6}, "experts: it has 6, the model has 8"},
        {{.seed = 1, .layers = 4}, "layers: it has 4, the model has 3"},
        {{.seed = 1, .layers = 3, .dense_layer = 2}, "layers with experts: it has 2, the model has 3"},
        {{.seed = 1, .hidden = 24}, "hidden: it has 24"},
        {{.seed = 1, .family = "mixtral"}, "of type mixtral, the model is qwen3_moe"},
    };
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        place p;
        open_place(&p, &rows[i].spec);
        q.base = p.model;
        refuse("router-norm", &q, MOEC_EFORMAT, rows[i].says);
        close_place(&p);
    }
}

static void test_weights(void **state)
{
    (void)state;
    moec_request q = request(NULL, 4);
    for (int threads = 1; threads <= 3; threads += 2) {
        moec_par_set_threads(threads);
        moec_plan *norm = plan("weight-norm", &q), *aimer = plan("aimer", &q);
        for (int64_t l = 0; l < L; l++)
            for (int64_t e = 0; e < E; e++) {
                const moec_mlp *x = &at.model->layer[l].expert[e];
                const moec_weight *const w[] = {&x->gate, &x->up, &x->down};
                double abs = 0.0, sq = 0.0, n = 3 * 16 * 12;
                for (int k = 0; k < 3; k++)
                    for (int64_t r = 0; r < w[k]->rows; r++)
                        for (int64_t c = 0; c < w[k]->cols; c++) {
                            const double v = read(w[k], r, c);
                            abs += fabs(v);
                            sq += v * v;
                        }
                near_to(norm->layer[l].score[e], sqrt(sq));
                near_to(aimer->layer[l].score[e], sqrt(sq / n) / (abs / n));
            }
        moec_plan_free(norm);
        moec_plan_free(aimer);
    }
    moec_par_set_threads(0);
}

/* Points on a line. */
static void test_cluster(void **state)
{
    (void)state;
    static const double x[6] = {0.0, 30.0, 1.0, 10.0, 12.0, 31.5};
    static const int32_t want[7][6] = {{0}, {0, 0, 0, 0, 0, 0}, {0, 1, 0, 0, 0, 1}, {0, 1, 0, 2, 2, 1}, {0, 1, 0, 2, 3, 1},
                                       {0, 1, 0, 2, 3, 4}, {0, 1, 2, 3, 4, 5}};
    double d[36];
    int32_t got[6];
    for (int i = 0; i < 36; i++)
        d[i] = fabs(x[i / 6] - x[i % 6]) - 100.0; /* below 0, as those of co-activation are */
    for (int k = 1; k <= 6; k++) {
        assert_int_equal(moec_cluster(got, d, 6, k, NULL), MOEC_OK);
        assert_memory_equal(got, want[k], sizeof got);
    }
    for (int i = 0; i < 36; i++)
        d[i] = 1.0; /* ties: the lowest numbers first */
    assert_int_equal(moec_cluster(got, d, 6, 5, NULL), MOEC_OK);
    assert_true(got[0] == 0 && got[1] == 0 && got[2] == 1);
    assert_int_equal(moec_cluster(got, d, 6, 0, NULL), MOEC_EINVAL);
    assert_int_equal(moec_cluster(got, d, 6, 7, NULL), MOEC_EINVAL);
    assert_int_equal(moec_cluster(got, d, 1, 1, NULL), MOEC_OK);
    assert_int_equal(got[0], 0);
    d[1] = (double)NAN;
    assert_int_equal(moec_cluster(got, d, 6, 2, NULL), MOEC_ENUMERIC);
}

static void test_stun(void **state)
{
    (void)state;
    moec_stats *s = make();
    moec_guard g;
    assert_int_equal(moec_guard_parse(&g, "0 6\n0 2", 7, at.model, "file", NULL), MOEC_OK);
    for (int64_t keep = 1; keep <= E; keep++) {
        moec_request q = request(NULL, keep);
        moec_plan *p = plan("stun", &q);
        for (int64_t l = 0; l < L; l++) {
            double all = 0.0;
            for (int e = 0; e < E; e++) {
                all += p->layer[l].score[e];
                assert_int_equal(p->layer[l].score[e] > 0.0, moec_plan_kept(p, l, e) >= 0);
            }
            assert_true(all == (double)E); /* everyone is stood for */
        }
        moec_plan_free(p);
        q.guard = &g;
        if (keep >= 2) {
            p = plan("stun", &q);
            assert_true(moec_plan_kept(p, 0, 2) >= 0 && moec_plan_kept(p, 0, 6) >= 0);
            moec_plan_free(p);
        }
    }
    moec_guard_release(&g);
    /* By co-activation: 0 and 5 belong together; of two the one that more tokens select stays. */
    for (int64_t l = 0; l < L; l++) {
        uint64_t *coact = moec_stat_at(s, 0, MOEC_STAT_COACT, l), *count = moec_stat_at(s, 0, MOEC_STAT_SELECTED, l);
        coact[5] = coact[5 * E] = 9;
        count[5] = 3;
    }
    moec_request q = request(s, 7);
    q.lambda1 = 0.0;
    q.lambda2 = 1.0;
    moec_plan *p = plan("stun", &q);
    assert_int_equal(moec_plan_kept(p, 1, 0), -1);
    near_to(p->layer[1].score[5], 2.0);
    assert_non_null(strstr(p->options, "\"stun-lambda2\": 1"));
    moec_plan_free(p);
    memset(moec_stat_at(s, 0, MOEC_STAT_COACT, 2), 0, E * E * sizeof(uint64_t));
    refuse("stun", &q, MOEC_EFORMAT, "layer 2: no two experts were selected together");
    moec_free(s->domain[0].data[MOEC_STAT_COACT]);
    s->domain[0].data[MOEC_STAT_COACT] = NULL;
    refuse("stun", &q, MOEC_EFORMAT, "needs the statistic coact, which domain text does not have; calibrate --tier 0");
    q.stats = NULL;
    refuse("stun", &q, MOEC_EINVAL, "--stun-lambda2 needs statistics");
    q.lambda2 = 0.0;
    refuse("stun", &q, MOEC_EINVAL, "one must be above");
    q.lambda1 = 1.0;
    q.allocation = MOEC_ALLOCATE_GLOBAL;
    refuse("stun", &q, MOEC_EINVAL, "only uniform");
    moec_stats_free(s);
}

/* Shares of the layers: .64 .16 .08 .04 .02 .02 .02 .02; eight times .125; .3 .3 .1 .1 .05 .05 .05 .05 */
static moec_stats *skewed(void)
{
    static const uint64_t counts[L][E] = {
        {2, 16, 8, 4, 2, 64, 2, 2}, {10, 10, 10, 10, 10, 10, 10, 10}, {30, 30, 10, 10, 5, 5, 5, 5}};
    moec_stats *s = make();
    for (int64_t l = 0; l < L; l++)
        memcpy(moec_stat_at(s, 0, MOEC_STAT_SELECTED, l), counts[l], sizeof counts[l]);
    return s;
}

static void test_allocation(void **state)
{
    (void)state;
    static const struct { moec_allocation how; int64_t keep, least, want[L]; const char *protect; } rows[] = {
        {MOEC_ALLOCATE_GLOBAL, 4, 0, {2, 8, 2}, ""},
        {MOEC_ALLOCATE_GLOBAL, 4, 3, {3, 6, 3}, ""},
        {MOEC_ALLOCATE_GLOBAL, 4, 0, {2, 5, 5}, "2 5\n2 6\n2 7"}, /* they stand before 0 and 1 of .3 */
        {MOEC_ALLOCATE_GLOBAL, 8, 0, {8, 8, 8}, ""},
        {MOEC_ALLOCATE_MASS, 4, 2, {6, 3, 3}, ""}, /* beyond two each: .08 .12 .14 .16 | .125 | .10 */
        {MOEC_ALLOCATE_MASS, 4, 0, {4, 4, 4}, ""}, /* four at least */
        {MOEC_ALLOCATE_MASS, 5, 0, {6, 4, 5}, ""}, /* beyond four each: .02 .04 | | .05 */
    };
    moec_stats *s = skewed();
    for (size_t i = 0; i < MOEC_COUNT(rows); i++) {
        moec_guard g;
        moec_request q = request(s, rows[i].keep);
        assert_int_equal(moec_guard_parse(&g, rows[i].protect, strlen(rows[i].protect), at.model, "file", NULL), MOEC_OK);
        q.guard = &g;
        q.allocation = rows[i].how;
        q.least = rows[i].least;
        q.plan_only = true;
        moec_plan *p = plan("frequency", &q);
        for (int64_t l = 0; l < L; l++)
            if (p->layer[l].n_keep != rows[i].want[l])
                fail_msg("row %zu: layer %d keeps %d, expected %d", i, (int)l, (int)p->layer[l].n_keep, (int)rows[i].want[l]);
        assert_int_equal(moec_plan_check(p, at.model, at.print.hex, NULL), moec_plan_even(p) ? MOEC_OK : MOEC_EFORMAT);
        assert_int_equal(p->pad, 0);
        assert_int_equal(moec_plan_total(p), L * rows[i].keep);
        moec_plan_free(p);
        moec_guard_release(&g);
    }
    moec_request q = request(s, 4);
    q.allocation = MOEC_ALLOCATE_GLOBAL;
    refuse("frequency", &q, MOEC_EINVAL, "layers would keep 2 to 8 experts");
    q.least = 5;
    refuse("frequency", &q, MOEC_EINVAL, "at least 5 experts");
    q.least = 0;
    q.keep = 1;
    refuse("frequency", &q, MOEC_EINVAL, "top-k 2");
    q.allocation = MOEC_ALLOCATE_UNIFORM;
    q.least = 2;
    refuse("frequency", &q, MOEC_EINVAL, "--min-experts");
    moec_stats_free(s);
}

/* Where a bias can rule dead experts out, unequal layers are padded; --pad-to is also the most that a layer keeps. Groups of
 * a router keep the same number each. */
static void test_padding_and_groups(void **state)
{
    (void)state;
    place p;
    const tiny_spec spec = tiny_of("deepseek_v3");
    open_place(&p, &spec);
    const int64_t n = p.model->dims.experts, groups = p.model->dims.groups, layers = p.model->moe_layers;
    assert_true(groups > 1 && layers > 1);
    moec_request q = {.model = p.model, .fingerprint = p.print.hex, .keep = n / 2, .allocation = MOEC_ALLOCATE_GLOBAL,
                      .drop_groups = true};
    int64_t uneven = 0;
    for (q.seed = 0; q.seed < 8; q.seed++) {
        moec_plan *a = plan("random", &q);
        assert_int_equal(moec_plan_check(a, p.model, p.print.hex, NULL), MOEC_OK);
        assert_int_equal(a->pad, moec_plan_total(a) == layers * a->layer[0].n_keep && moec_plan_even(a) ? 0 : moec_plan_most(a));
        assert_int_equal(moec_plan_total(a), layers * q.keep);
        uneven += a->pad > 0;
        moec_plan_free(a);
        q.pad = n / 2; /* no layer may keep more, so all keep as many */
        a = plan("random", &q);
        assert_true(a->pad == q.pad && a->layer[0].n_keep == q.keep && a->layer[1].n_keep == q.keep);
        moec_plan_free(a);
        q.pad = 0;
    }
    assert_true(uneven > 0);
    q.drop_groups = false;
    for (q.seed = 0; q.seed < 8; q.seed++) {
        moec_plan *a = plan("random", &q);
        assert_int_equal(moec_plan_check(a, p.model, p.print.hex, NULL), MOEC_OK);
        assert_int_equal(moec_plan_total(a), layers * q.keep);
        for (int64_t l = 0; l < layers; l++) {
            int64_t of_first = 0;
            for (int64_t k = 0; k < a->layer[l].n_keep; k++)
                of_first += a->layer[l].keep[k] < n / groups;
            assert_int_equal(of_first * groups, a->layer[l].n_keep);
        }
        moec_plan_free(a);
    }
    close_place(&p);
}

static void test_nested(void **state)
{
    (void)state;
    static const char *const methods[] = {"frequency", "random", "aimer"};
    static const double share[] = {0.125, 0.25, 0.5, 0.625}, turned[] = {0.5, 0.25}, all[] = {0.5, 1.0};
    moec_plan *p[4];
    moec_err err = {MOEC_OK, ""};
    moec_stats *s = skewed();
    for (size_t m = 0; m < MOEC_COUNT(methods); m++)
        for (int how = 0; how < 3; how++) {
            moec_request q = request(s, 0);
            q.allocation = (moec_allocation)how;
            q.least = how == 0 ? 0 : 2;
            q.plan_only = true;
            assert_int_equal(moec_method_plans(p, MOEC_PRUNE, methods[m], &q, share, 4, &err), MOEC_OK);
            for (int i = 0; i < 4; i++) {
                moec_plan *alone = NULL;
                q.share = share[i];
                assert_int_equal(moec_method_plan(&alone, MOEC_PRUNE, methods[m], &q, NULL), MOEC_OK);
                for (int64_t l = 0; l < L; l++) {
                    assert_int_equal(alone->layer[l].n_keep, p[i]->layer[l].n_keep);
                    for (int64_t k = 0; k < p[i]->layer[l].n_keep; k++) {
                        assert_int_equal(alone->layer[l].keep[k], p[i]->layer[l].keep[k]);
                        assert_true(i == 0 || moec_plan_kept(p[i - 1], l, p[i]->layer[l].keep[k]) >= 0);
                    }
                }
                moec_plan_free(alone);
            }
            for (int i = 0; i < 4; i++)
                moec_plan_free(p[i]);
        }
    moec_request q = request(s, 0);
    assert_int_equal(moec_method_plans(p, MOEC_PRUNE, "random", &q, turned, 2, &err), MOEC_EINVAL);
    assert_int_equal(moec_method_plans(p, MOEC_PRUNE, "random", &q, all, 2, &err), MOEC_EINVAL);
    assert_int_equal(moec_method_plans(p, MOEC_PRUNE, "stun", &q, share, 2, &err), MOEC_EINVAL);
    assert_int_equal(moec_method_plans(p, MOEC_PRUNE, "nothing", &q, share, 2, &err), MOEC_EINVAL);
    assert_null(p[0]);
    moec_stats_free(s);
}

/* 3 layers: the pool ends before layer round(2.25) = 2. */
static void test_super(void **state)
{
    (void)state;
    moec_stats *s = make();
    moec_json *about;
    float *a = moec_stat_at(s, 0, MOEC_STAT_OUT_ABSMAX, 0), *c = moec_stat_at(s, 0, MOEC_STAT_OUT_ABSMAX, 2);
    a[3] = 50.0f;
    a[4] = 4.0f;
    c[1] = 70.0f;
    ((int32_t *)moec_stat_at(s, 0, MOEC_STAT_OUT_CHANNEL, 0))[3] = 11;
    assert_int_equal(moec_super_describe(&about, s, 2, NULL), MOEC_OK);
    const moec_json *list = moec_json_get(about, "experts"), *first = moec_json_at(list, 0), *second = moec_json_at(list, 1);
    double v;
    int64_t i;
    bool flag;
    assert_int_equal(moec_json_len(list), 2);
    assert_true(moec_json_int(moec_json_get(first, "layer"), &i) && i == 2);
    assert_true(moec_json_bool(moec_json_get(first, "protected"), &flag) && !flag);
    assert_true(moec_json_bool(moec_json_get(first, "in_pool"), &flag) && !flag);
    assert_true(moec_json_int(moec_json_get(second, "expert"), &i) && i == 3);
    assert_true(moec_json_int(moec_json_get(second, "channel"), &i) && i == 11);
    assert_true(moec_json_bool(moec_json_get(second, "protected"), &flag) && flag);
    assert_true(moec_json_real(moec_json_get(about, "tenth_of_max"), &v) && v == 5.0);
    assert_true(moec_json_real(moec_json_get(about, "percentile_99_5"), &v));
    near_to(v, 4.0 + 0.925 * 46.0); /* 16 values: 0.995 * 15 = 14.925 */
    assert_true(moec_json_int(moec_json_get(about, "super"), &i) && i == 1);
    moec_json_free(about);
    moec_stats_free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nllb),       cmocka_unit_test(test_negative_logits),
        cmocka_unit_test(test_router),     cmocka_unit_test(test_router_refusals),
        cmocka_unit_test(test_weights),    cmocka_unit_test(test_cluster),
        cmocka_unit_test(test_stun),       cmocka_unit_test(test_allocation),
        cmocka_unit_test(test_padding_and_groups), cmocka_unit_test(test_nested),
        cmocka_unit_test(test_super),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
