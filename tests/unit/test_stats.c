/* The table of statistics, and statistics in memory and on disk: the laws of merging, files that come back bit by bit, and
 * refusal of everything that is not a whole file of ours. */
#include "base/file.h"
#include "base/mem.h"
#include "calib/stats_internal.h"
#include "ckpt/seal.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmocka.h>

static uint64_t seed;

static uint64_t next_u64(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static int64_t moe_layer[] = {1, 2, 4};
static char rule[] = "{\"score\": \"softmax\", \"top_k\": 2, \"null_experts\": 3}", options[] = "{\"seq_len\": 128}";
static char folder[] = "/tmp/moec-stats-XXXXXX";
static char path_a[64], path_b[64], path_tmp[72];

static moec_stats_meta make_meta(int tier)
{
    return (moec_stats_meta){.model = "00112233445566778899aabbccddeeff", .model_type = "qwen3_moe", .router_rule = rule,
                             .options = options, .compute = "f32", .layers = 5, .moe_layers = 3, .experts = 4,
                             .top_k = 2, .hidden = 6, .expert_width = 5, .null_experts = 3, .moe_layer = moe_layer,
                             .tier = tier};
}

static int64_t all_cells(const moec_stats_meta *m, moec_stat kind)
{
    return moec_stat_cells(m, kind) * moec_stat_blocks(m, kind);
}

/* Small whole numbers everywhere, so that sums do not depend on their order. */
static void fill(moec_stats *s)
{
    for (int d = 0; d < s->n_domains; d++) {
        s->domain[d].tokens = next_u64() % 1000;
        s->domain[d].sequences = next_u64() % 10;
        s->domain[d].weight = (double)(next_u64() % 8) / 2;
        snprintf(s->domain[d].digest, 33, "%016llx%016llx", (unsigned long long)next_u64(),
                 (unsigned long long)next_u64());
        for (int k = 0; k < MOEC_STAT_COUNT; k++) {
            const moec_stat_kind *row = &moec_stat_kinds[k];
            for (int64_t i = 0; s->domain[d].data[k] && i < all_cells(&s->meta, (moec_stat)k); i++) {
                uint64_t v = next_u64() % 6;
                void *data = s->domain[d].data[k];
                switch (row->cell) {
                case MOEC_CELL_U64: ((uint64_t *)data)[i] = v; break;
                case MOEC_CELL_U32: ((uint32_t *)data)[i] = (uint32_t)v; break;
                case MOEC_CELL_F64: ((double *)data)[i] = (double)v - (row->low < 0 ? 3 : 0); break;
                case MOEC_CELL_F32: ((float *)data)[i] = (float)v; break;
                case MOEC_CELL_I32: ((int32_t *)data)[i] = (int32_t)v; break;
                }
            }
        }
    }
}

static moec_stats *make_stats(int tier, int n, const char *const *names)
{
    moec_stats *s;
    moec_err err = {MOEC_OK, ""};
    moec_stats_meta m = make_meta(tier);
    if (moec_stats_new(&s, &m, n, names, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    fill(s);
    return s;
}

static const char *const two_names[] = {"code", "Dépêche/100% .x"};

static bool same_data(const moec_stats_domain *a, const moec_stats_domain *b, const moec_stats_meta *m)
{
    bool same = strcmp(a->name, b->name) == 0 && a->tokens == b->tokens && a->sequences == b->sequences &&
                memcmp(&a->weight, &b->weight, sizeof a->weight) == 0 && strcmp(a->digest, b->digest) == 0;
    for (int k = 0; same && k < MOEC_STAT_COUNT; k++) {
        same = !a->data[k] == !b->data[k];
        if (same && a->data[k])
            same = memcmp(a->data[k], b->data[k],
                          (size_t)all_cells(m, (moec_stat)k) * moec_cell_bytes(moec_stat_kinds[k].cell)) == 0;
    }
    return same;
}

static void assert_same(const moec_stats *a, const moec_stats *b)
{
    assert_string_equal(a->meta.model, b->meta.model);
    assert_string_equal(a->meta.model_type, b->meta.model_type);
    assert_string_equal(a->meta.router_rule, b->meta.router_rule);
    assert_string_equal(a->meta.options, b->meta.options);
    assert_string_equal(a->meta.compute, b->meta.compute);
    for (int i = 0; i < MOEC_SIZE_ROWS; i++)
        assert_memory_equal((const char *)&a->meta + moec__size_rows[i].offset,
                            (const char *)&b->meta + moec__size_rows[i].offset, sizeof(int64_t));
    assert_memory_equal(a->meta.moe_layer, b->meta.moe_layer, (size_t)a->meta.moe_layers * sizeof(int64_t));
    assert_int_equal(a->meta.tier, b->meta.tier);
    assert_int_equal(a->n_domains, b->n_domains);
    for (int d = 0; d < a->n_domains; d++)
        assert_true(same_data(&a->domain[d], &b->domain[d], &a->meta));
}

static moec_stats *load(const char *path)
{
    moec_stats *s;
    moec_err err = {MOEC_OK, ""};
    if (moec_stats_load(&s, path, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    return s;
}

static void save(const moec_stats *s, const char *path)
{
    moec_err err = {MOEC_OK, ""};
    if (moec_stats_save(s, path, &err) != MOEC_OK)
        fail_msg("%s", err.text);
}

static char *bytes_of(const char *path, size_t *n)
{
    char *bytes;
    assert_int_equal(moec_file_read(&bytes, n, path, 1 << 26, NULL), MOEC_OK);
    return bytes;
}

/* ---- the table ---------------------------------------------------------------------------------------------------- */

static void every_row_is_sound(void **state)
{
    (void)state;
    moec_stats_meta m = make_meta(1);
    for (int k = 0; k < MOEC_STAT_COUNT; k++) {
        const moec_stat_kind *row = &moec_stat_kinds[k];
        int64_t dim[MOEC_STATS_MAX_RANK], n = 1;
        assert_true(row->name && strlen(row->name) < 31 && row->unit[0] && row->about[0]);
        assert_true(strspn(row->shape, "ENkjHIrcpf345n") == strlen(row->shape));
        assert_true(strlen(row->shape) < MOEC_STATS_MAX_RANK && row->tier >= 0 && row->tier <= 2);
        assert_true(row->merge != MOEC_MERGE_FOLLOW || moec_stat_kinds[k - 1].merge == MOEC_MERGE_MAX);
        assert_true(row->start == 0 || row->cell == MOEC_CELL_F64);
        int rank = moec__stat_dims(&m, (moec_stat)k, dim);
        for (int i = 0; i < rank; i++)
            n *= dim[i];
        assert_int_equal(n, all_cells(&m, (moec_stat)k));
        for (int j = 0; j < k; j++)
            assert_string_not_equal(row->name, moec_stat_kinds[j].name);
    }
    assert_int_equal(moec_stat_cells(&m, MOEC_STAT_TOPP_COUNT), 20 * 5);
    assert_int_equal(moec_stat_cells(&m, MOEC_STAT_COS_BLOCK), 36);
    assert_int_equal(moec_stat_blocks(&m, MOEC_STAT_COS_BLOCK), 1);
    assert_int_equal(moec_stat_blocks(&m, MOEC_STAT_TRANS), 2);
    assert_int_equal(moec_stat_cells(&m, MOEC_STAT_NULL_SELECTED), 3);
    m.top_k = m.moe_layers = 1;
    m.null_experts = 0;
    assert_int_equal(moec_stat_blocks(&m, MOEC_STAT_NULL_SELECTED), 0);
    assert_int_equal(moec_stat_blocks(&m, MOEC_STAT_RATIO_HIST), 0);
    assert_int_equal(moec_stat_blocks(&m, MOEC_STAT_TRANS), 0);
    assert_int_equal(moec_stat_blocks(&m, MOEC_STAT_CUMGATE_HIST), 1);
}

static void starts_empty(void **state)
{
    (void)state;
    moec_stats *s;
    moec_stats_meta m = make_meta(0);
    assert_int_equal(moec_stats_new(&s, &m, 2, two_names, NULL), MOEC_OK);
    assert_null(s->domain[0].data[MOEC_STAT_Y_SUM]);
    assert_null(moec_stat_at(s, 0, MOEC_STAT_Y_SUM, 0));
    assert_null(moec_stat_at(s, 0, MOEC_STAT_SELECTED, 3));
    assert_null(moec_stat_at(s, 0, MOEC_STAT_TRANS, -1));
    assert_ptr_equal(moec_stat_at(s, 1, MOEC_STAT_COS_BLOCK, 2), s->domain[1].data[MOEC_STAT_COS_BLOCK]);
    const double *top = moec_stat_at(s, 1, MOEC_STAT_COS_ROUTER_MAX, 2);
    const uint64_t *n = moec_stat_at(s, 1, MOEC_STAT_SELECTED, 2);
    for (int e = 0; e < 4; e++)
        assert_true(top[e] == -1 && n[e] == 0);
    moec_stats_free(s);
}

static void refuses_bad_meta(void **state)
{
    (void)state;
    static char long_name[300], broken[] = "{";
    static int64_t wrong_layers[] = {2, 2, 4}, high_layers[] = {1, 2, 5};
    memset(long_name, 'x', sizeof long_name - 1);
    const char *const bad_names[][2] = {{"a", "a"}, {"a", ""}, {long_name, "b"}};
    moec_stats_meta good = make_meta(1), bad[11];
    for (size_t i = 0; i < MOEC_COUNT(bad); i++)
        bad[i] = good;
    bad[0].layers = 0, bad[1].layers = 4097, bad[2].moe_layers = 6, bad[3].experts = 65537, bad[4].top_k = 5;
    bad[5].hidden = -1, bad[6].tier = 2, bad[7].moe_layer = wrong_layers, bad[8].moe_layer = high_layers;
    bad[9].options = broken, bad[10].router_rule = NULL;
    for (size_t i = 0; i < MOEC_COUNT(bad); i++) {
        moec_stats *s = NULL;
        moec_err err = {MOEC_OK, ""};
        assert_int_equal(moec_stats_new(&s, &bad[i], 2, two_names, &err), MOEC_EINVAL);
        assert_true(!s && err.code == MOEC_EINVAL && err.text[0]);
    }
    for (size_t i = 0; i < MOEC_COUNT(bad_names); i++) {
        moec_stats *s = NULL;
        assert_int_equal(moec_stats_new(&s, &good, 2, bad_names[i], NULL), MOEC_EINVAL);
        assert_null(s);
    }
}

/* ---- merging ------------------------------------------------------------------------------------------------------ */

static moec_stats *merged(const moec_stats *a, const moec_stats *b, char **dropped)
{
    /* A copy of `a` by way of its file: merging changes its first argument. */
    save(a, path_b);
    moec_stats *into = load(path_b);
    moec_err err = {MOEC_OK, ""};
    if (moec_stats_merge(into, b, dropped, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    return into;
}

static const moec_stats_domain *named(const moec_stats *s, const char *name)
{
    for (int d = 0; d < s->n_domains; d++)
        if (strcmp(s->domain[d].name, name) == 0)
            return &s->domain[d];
    fail_msg("no domain %s", name);
    return NULL;
}

static void merging_adds(void **state)
{
    (void)state;
    seed = 11;
    static const char *const left[] = {"a", "b"}, *const right[] = {"b", "c"};
    moec_stats *a = make_stats(1, 2, left), *b = make_stats(1, 2, right);
    moec_stats *ab = merged(a, b, NULL);
    assert_int_equal(ab->n_domains, 3);
    assert_true(same_data(named(ab, "a"), named(a, "a"), &a->meta));
    assert_true(same_data(named(ab, "c"), named(b, "c"), &a->meta));
    const moec_stats_domain *x = named(a, "b"), *y = named(b, "b"), *sum = named(ab, "b");
    assert_int_equal(sum->tokens, x->tokens + y->tokens);
    assert_true(memcmp(&sum->weight, &x->weight, sizeof(double)) == 0);
    const double *gx = x->data[MOEC_STAT_GATE_SUM], *gy = y->data[MOEC_STAT_GATE_SUM], *gs = sum->data[MOEC_STAT_GATE_SUM];
    const float *mx = x->data[MOEC_STAT_OUT_ABSMAX], *my = y->data[MOEC_STAT_OUT_ABSMAX],
                *ms = sum->data[MOEC_STAT_OUT_ABSMAX];
    const int32_t *cx = x->data[MOEC_STAT_OUT_CHANNEL], *cy = y->data[MOEC_STAT_OUT_CHANNEL],
                  *cs = sum->data[MOEC_STAT_OUT_CHANNEL];
    const double *tx = x->data[MOEC_STAT_COS_ROUTER_MAX], *ty = y->data[MOEC_STAT_COS_ROUTER_MAX],
                 *ts = sum->data[MOEC_STAT_COS_ROUTER_MAX];
    for (int i = 0; i < 12; i++) {
        assert_true(gs[i] == gx[i] + gy[i] && ms[i] == fmaxf(mx[i], my[i]) && ts[i] == fmax(tx[i], ty[i]));
        assert_int_equal(cs[i], mx[i] > my[i] ? cx[i] : my[i] > mx[i] ? cy[i] : cx[i] < cy[i] ? cx[i] : cy[i]);
    }
    moec_stats_free(ab);
    moec_stats_free(b);
    moec_stats_free(a);
}

/* Any order and any grouping give the same sums, digests and options. */
static void merging_commutes_and_associates(void **state)
{
    (void)state;
    seed = 12;
    static const char *const names[] = {"a", "b"};
    static char other[] = "{\"seq_len\": 64}", third[] = "{ \"seq_len\" :  32 }";
    moec_stats *part[3];
    for (int i = 0; i < 3; i++) {
        part[i] = make_stats(0, 2, names);
        part[i]->domain[0].weight = part[i]->domain[1].weight = 1;
    }
    char *one = part[1]->meta.options, *two = part[2]->meta.options;
    part[1]->meta.options = other, part[2]->meta.options = third;
    moec_stats *ab = merged(part[0], part[1], NULL), *ba = merged(part[1], part[0], NULL);
    assert_same(ab, ba);
    assert_string_equal(ab->meta.options, "{\"merged\": [{\"seq_len\": 128}, {\"seq_len\": 64}]}");
    moec_stats *bc = merged(part[1], part[2], NULL), *ab_c = merged(ab, part[2], NULL), *a_bc = merged(part[0], bc, NULL);
    assert_same(ab_c, a_bc);
    moec_stats *twice = merged(ab_c, part[2], NULL);
    assert_string_equal(twice->meta.options, ab_c->meta.options);
    part[1]->meta.options = one, part[2]->meta.options = two;
    moec_stats *all[] = {twice, a_bc, ab_c, bc, ba, ab, part[0], part[1], part[2]};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_stats_free(all[i]);
}

static void merging_drops_what_one_lacks(void **state)
{
    (void)state;
    seed = 13;
    char *dropped;
    static const char *const left[] = {"a"}, *const right[] = {"b"};
    moec_stats *a = make_stats(1, 1, left), *b = make_stats(0, 1, right);
    moec_stats *ab = merged(a, b, &dropped), *empty = make_stats(1, 0, NULL);
    assert_string_equal(dropped, "logit_gram y_sum gy_sum act_abs act_sq gact_sq xin_abs xin_sq");
    assert_int_equal(ab->meta.tier, 0);
    assert_null(ab->domain[0].data[MOEC_STAT_Y_SUM]);
    moec_free(dropped);
    save(ab, path_a);
    moec_stats_free(load(path_a));
    assert_int_equal(moec_stats_merge(empty, a, &dropped, NULL), MOEC_OK);
    assert_string_equal(dropped, "");
    moec_free(dropped);
    assert_same(empty, a);
    snprintf(empty->meta.compute, sizeof empty->meta.compute, "bf16");
    assert_int_equal(moec_stats_merge(a, empty, NULL, NULL), MOEC_OK);
    assert_string_equal(a->meta.compute, "mixed");
    moec_stats_free(empty);
    moec_stats_free(ab);
    moec_stats_free(b);
    moec_stats_free(a);
}

static moec_stats *measured(int64_t group, bool kl)
{
    static const char *const name[] = {"a"};
    moec_stats *s = make_stats(0, 1, name);
    for (moec_stat k = MOEC_STAT_QUANT_SQ; k <= MOEC_STAT_QUANT_KL; k++) {
        assert_null(s->domain[0].data[k]);
        if (k != MOEC_STAT_QUANT_KL || kl)
            assert_int_equal(moec_stats_collect(s, k, NULL), MOEC_OK);
    }
    assert_int_equal(moec_stats_quant_group(s), -1);
    assert_int_equal(moec_stats_set_quant_group(s, group, NULL), MOEC_OK);
    assert_int_equal(moec_stats_quant_group(s), group);
    fill(s);
    return s;
}

static void errors_merge_with_their_like(void **state)
{
    (void)state;
    seed = 21;
    char *dropped;
    moec_stats *a = measured(64, true), *b = measured(64, true), *less = measured(64, false), *other = measured(32, true);
    moec_stats *plain = make_stats(1, 1, (const char *const[]){"a"}), *ab = merged(a, b, &dropped);
    const double *sq[] = {a->domain[0].data[MOEC_STAT_QUANT_SQ], b->domain[0].data[MOEC_STAT_QUANT_SQ],
                          ab->domain[0].data[MOEC_STAT_QUANT_SQ]};
    assert_string_equal(dropped, "");
    moec_free(dropped);
    for (int64_t i = 0; i < all_cells(&a->meta, MOEC_STAT_QUANT_SQ); i++)
        assert_true(sq[0][i] + sq[1][i] <= sq[2][i] && sq[0][i] + sq[1][i] >= sq[2][i]);
    assert_int_equal(moec_stats_quant_group(ab), 64);
    save(ab, path_a);
    moec_stats *back = load(path_a);
    assert_same(ab, back);
    const moec_stats *with[] = {less, other, plain};
    const char *const gone[] = {"quant_kl", "quant_sq quant_fro quant_kl",
                                "logit_gram y_sum gy_sum act_abs act_sq gact_sq xin_abs xin_sq quant_sq quant_fro quant_kl"};
    for (int i = 0; i < 3; i++) {
        moec_stats *m = merged(a, with[i], &dropped);
        assert_string_equal(dropped, gone[i]);
        assert_true(!m->domain[0].data[MOEC_STAT_QUANT_SQ] == (i > 0));
        assert_int_equal(moec_stats_quant_group(m), i == 0 ? 64 : -1);
        assert_int_equal(moec_stats_set_quant_group(m, 16, NULL), MOEC_OK); /* of every set of merged options */
        assert_int_equal(moec_stats_quant_group(m), 16);
        moec_free(dropped);
        moec_stats_free(m);
    }
    moec_stats *all[] = {a, b, less, other, plain, ab, back};
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_stats_free(all[i]);
}

static void merging_refuses_strangers(void **state)
{
    (void)state;
    seed = 14;
    moec_stats *a = make_stats(0, 2, two_names);
    static char other_rule[] = "{\"score\": \"sigmoid\"}";
    static int64_t other_layers[] = {0, 2, 4};
    const char *const word[] = {"the model", "model_type", "router_rule", "layers", "moe_layer"};
    for (int i = 0; i < 5; i++) {
        moec_err err = {MOEC_OK, ""};
        moec_stats *b;
        moec_stats_meta m = make_meta(0);
        if (i == 0)
            m.model[0] = 'f';
        if (i == 1)
            m.model_type[0] = 'Q';
        if (i == 2)
            m.router_rule = other_rule;
        if (i == 3)
            m.layers = 6;
        if (i == 4)
            m.moe_layer = other_layers;
        assert_int_equal(moec_stats_new(&b, &m, 1, two_names, NULL), MOEC_OK);
        assert_int_equal(moec_stats_merge(a, b, NULL, &err), MOEC_EFORMAT);
        assert_non_null(strstr(err.text, word[i]));
        moec_stats_free(b);
    }
    moec_stats_free(a);
}

static void counts_stop_at_the_top(void **state)
{
    (void)state;
    uint64_t big[] = {UINT64_MAX - 1, 5}, more[] = {3, 6};
    uint32_t small[] = {UINT32_MAX, 5}, add[] = {1, 6};
    moec_stat_add(MOEC_STAT_COACT, big, more, 2, NULL, NULL);
    moec_stat_add(MOEC_STAT_RATIO_HIST, small, add, 2, NULL, NULL);
    assert_true(big[0] == UINT64_MAX && big[1] == 11 && small[0] == UINT32_MAX && small[1] == 11);
    char sum[33] = "ffffffffffffffffffffffffffffffff";
    moec__digest_add(sum, "00000000000000000000000000000002");
    assert_string_equal(sum, "00000000000000000000000000000001");
    moec__digest_add(sum, "");
    assert_string_equal(sum, "00000000000000000000000000000001");
    moec__digest_add(sum, "merged");
    assert_string_equal(sum, "merged");
}

/* ---- files -------------------------------------------------------------------------------------------------------- */

static void files_come_back(void **state)
{
    (void)state;
    seed = 21;
    for (int tier = 0; tier < 2; tier++) {
        size_t n_a, n_b;
        moec_stats *s = make_stats(tier, 2, two_names), *again;
        ((double *)s->domain[0].data[MOEC_STAT_LOGIT_SUM])[3] = -0.1; /* not a whole number */
        ((double *)s->domain[0].data[MOEC_STAT_GATE_SUM])[3] = 5e-324;
        save(s, path_a);
        again = load(path_a);
        assert_same(s, again);
        save(again, path_b);
        char *a = bytes_of(path_a, &n_a), *b = bytes_of(path_b, &n_b);
        assert_int_equal(n_a, n_b);
        assert_memory_equal(a, b, n_a);
        assert_false(moec_path_exists(path_tmp));
        moec_stats_free(again);
        assert_int_equal(moec_stats_load_memory(&again, a, n_a, "memory", NULL), MOEC_OK);
        assert_same(s, again);
        moec_stats_free(again);
        moec_free(a);
        moec_free(b);
        moec_stats_free(s);
    }
}

static void odd_contents_come_back(void **state)
{
    (void)state;
    static const char *const names[] = {".", "..", "%2F", "a/b", "\n\x7f", "日本語", " x ", "z", "a"};
    static char long_options[70000] = "{\"text\": \"";
    memset(long_options + 10, 'y', sizeof long_options - 13);
    memcpy(long_options + sizeof long_options - 3, "\"}", 3);
    moec_stats *s, *again;
    moec_stats_meta m = make_meta(0);
    m.top_k = m.moe_layers = 1; /* some kinds do not apply */
    m.options = long_options;   /* more than an HDF5 object header holds */
    m.model_type[0] = '\0';
    assert_int_equal(moec_stats_new(&s, &m, (int)MOEC_COUNT(names), names, NULL), MOEC_OK);
    s->domain[2].tokens = INT64_MAX;
    save(s, path_a);
    again = load(path_a);
    assert_same(s, again);
    moec_stats_free(again);
    moec_stats_free(s);
    assert_int_equal(moec_stats_new(&s, &m, 0, NULL, NULL), MOEC_OK);
    save(s, path_a);
    again = load(path_a);
    assert_same(s, again);
    moec_stats_free(again);
    moec_stats_free(s);
}

static void damage_is_found(void **state)
{
    (void)state;
    seed = 31;
    size_t n;
    moec_stats *s = make_stats(0, 1, two_names), *out;
    save(s, path_a);
    char *bytes = bytes_of(path_a, &n);
    for (size_t at = 0; at < n; at += at < 700 ? 1 : 97) {
        moec_err err = {MOEC_OK, ""};
        bytes[at] ^= 16;
        assert_int_equal(moec_stats_load_memory(&out, bytes, n, "memory", &err), MOEC_EFORMAT);
        assert_true(!out && strstr(err.text, "memory"));
        bytes[at] ^= 16;
    }
    const size_t cut[] = {0, 1, 511, 512, 513, n / 2, n - 1};
    for (size_t i = 0; i < MOEC_COUNT(cut); i++) {
        assert_int_equal(moec_stats_load_memory(&out, bytes, cut[i], "memory", NULL), MOEC_EFORMAT);
        assert_int_equal(moec_file_write(path_b, bytes, cut[i], NULL), MOEC_OK);
        assert_int_equal(moec_stats_load(&out, path_b, NULL), MOEC_EFORMAT);
    }
    assert_int_equal(moec_file_write(path_b, bytes, n + 1, NULL), MOEC_OK); /* the NUL that moec_file_read adds */
    assert_int_equal(moec_stats_load(&out, path_b, NULL), MOEC_EFORMAT);
    assert_int_equal(moec_stats_load(&out, "/nonexistent/x", NULL), MOEC_EIO);
    assert_int_equal(moec_stats_load(&out, folder, NULL), MOEC_EFORMAT);
    assert_int_equal(moec_stats_load(&out, "/dev/zero", NULL), MOEC_EFORMAT);
    moec_free(bytes);
    moec_stats_free(s);
}

static void numbers_are_checked(void **state)
{
    (void)state;
    seed = 41;
    const struct {
        moec_stat kind;
        int64_t at;
        double value;
        const char *place;
    } bad[] = {{MOEC_STAT_GNORM_SUM, 6, (double)NAN, "gnorm_sum: layer 2, expert 2"},
               {MOEC_STAT_LOGIT_SUM, 11, (double)INFINITY, "logit_sum: layer 4, expert 3"},
               {MOEC_STAT_GATE_SQ, 0, -1e-9, "gate_sq: layer 1, expert 0"},
               {MOEC_STAT_XIN_SQ, 35, (double)NAN, "xin_sq: layer 2, expert 1"},
               {MOEC_STAT_COS_MOE, 2, (double)NAN, "cos_moe: layer 4"},
               {MOEC_STAT_OUT_ABSMAX, 4, (double)INFINITY, "out_absmax: layer 2, expert 0"},
               {MOEC_STAT_OUT_CHANNEL, 4, 6, "out_channel: layer 2, expert 0"},
               {MOEC_STAT_COS_BLOCK, 7, (double)NAN, "cos_block: cell 7"}};
    unlink(path_a);
    for (size_t i = 0; i < MOEC_COUNT(bad); i++) {
        moec_err err = {MOEC_OK, ""};
        moec_stats *s = make_stats(1, 2, two_names);
        void *data = s->domain[1].data[bad[i].kind];
        switch (moec_stat_kinds[bad[i].kind].cell) {
        case MOEC_CELL_F64: ((double *)data)[bad[i].at] = bad[i].value; break;
        case MOEC_CELL_F32: ((float *)data)[bad[i].at] = (float)bad[i].value; break;
        default: ((int32_t *)data)[bad[i].at] = (int32_t)bad[i].value;
        }
        assert_int_equal(moec_stats_save(s, path_a, &err), MOEC_ENUMERIC);
        if (!strstr(err.text, bad[i].place))
            fail_msg("%s", err.text);
        assert_false(moec_path_exists(path_a));
        moec_stats_free(s);
    }
}

/* ---- files that are sealed and yet wrong -------------------------------------------------------------------------- */

/* Writes a file as moec_stats_save would, with one thing changed. */
typedef struct forgery {
    const char *name, *expect; /* expect: part of the error text */
    int64_t version, experts, tokens, layer2;
    const char *options, *kinds, *link;
    moec_dtype dtype;
    int64_t extent;
    bool no_domains, no_digest, real_tokens;
} forgery;

static void forge(const forgery *f)
{
    moec_h5 *h;
    moec_err err = {MOEC_OK, ""};
    char text[200];
    uint64_t values[64] = {0};
    int64_t layers[] = {1, 2, f->layer2}, dim[] = {3, f->extent};
    const struct {
        const char *name;
        int64_t v;
    } size[] = {{"format_version", f->version}, {"layers", 5}, {"moe_layers", 3}, {"experts", f->experts}, {"top_k", 2},
                {"hidden", 6}, {"expert_width", 5}, {"tier", 0}};
    bool good = moec_h5_create(&h, path_a, &err) == MOEC_OK && moec_h5_group(h, "/meta", &err) == MOEC_OK;
    for (size_t i = 0; good && i < MOEC_COUNT(size); i++)
        good = moec_h5_put_int(h, "/meta", size[i].name, size[i].v, &err) == MOEC_OK;
    good = good && moec_h5_put_ints(h, "/meta", "moe_layer", layers, 3, &err) == MOEC_OK &&
           moec_h5_put_text(h, "/meta", "model", "m", &err) == MOEC_OK &&
           moec_h5_put_text(h, "/meta", "model_type", "t", &err) == MOEC_OK &&
           moec_h5_put_text(h, "/meta", "router_rule", "{}", &err) == MOEC_OK &&
           moec_h5_put_text(h, "/meta", "options", f->options, &err) == MOEC_OK &&
           moec_h5_put_text(h, "/meta", "compute", "f32", &err) == MOEC_OK &&
           moec_h5_put_text(h, "/meta", "kinds", f->kinds, &err) == MOEC_OK;
    if (good && !f->no_domains) {
        snprintf(text, sizeof text, "/domains/%s", f->link);
        good = moec_h5_group(h, "/domains", &err) == MOEC_OK && moec_h5_group(h, text, &err) == MOEC_OK &&
               (f->real_tokens ? moec_h5_put_real(h, text, "tokens", 1, &err)
                               : moec_h5_put_int(h, text, "tokens", f->tokens, &err)) == MOEC_OK &&
               moec_h5_put_int(h, text, "sequences", 1, &err) == MOEC_OK &&
               moec_h5_put_real(h, text, "weight", 1, &err) == MOEC_OK &&
               (f->no_digest || moec_h5_put_text(h, text, "digest", "", &err) == MOEC_OK);
        snprintf(text, sizeof text, "/domains/%s/t0", f->link);
        good = good && moec_h5_group(h, text, &err) == MOEC_OK;
        snprintf(text, sizeof text, "/domains/%s/t0/selected", f->link);
        good = good && moec_h5_put_array(h, text, f->dtype, 2, dim, values, &err) == MOEC_OK;
    }
    moec_status closed = moec_h5_close(h, &err);
    if (!good || closed != MOEC_OK || moec_seal_write(path_a, MOEC_STATS_TITLE, &err) != MOEC_OK)
        fail_msg("%s: %s", f->name, err.text);
}

static void forgeries_are_refused(void **state)
{
    (void)state;
#define GOOD                                                                                                              \
    .version = MOEC_STATS_FORMAT, .experts = 4, .tokens = 7, .layer2 = 4, .options = "{}", .kinds = "selected tomorrow", \
    .link = "a%2Fb", .dtype = MOEC_U64, .extent = 4
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverride-init"
    static const forgery all[] = {
        {"nothing", NULL, GOOD},
        {"version", "version 2", GOOD, .version = 2},
        {"experts", "experts: is 65537", GOOD, .experts = 65537},
        {"experts 0", "experts: is 0", GOOD, .experts = 0},
        {"top_k", "top_k is 2", GOOD, .experts = 1},
        {"extent", "[3, 4], expected [3, 5]", GOOD, .experts = 5},
        {"huge", "expected [3, 65536]", GOOD, .experts = 65536},
        {"dtype", "not of type U64", GOOD, .dtype = MOEC_F64},
        {"tokens", "tokens: is -1", GOOD, .tokens = -1},
        {"tokens' type", "of another type", GOOD, .real_tokens = true},
        {"layers", "moe_layer[2] is 5", GOOD, .layer2 = 5},
        {"options", "JSON", GOOD, .options = "{]"},
        {"lost kind", "missing", GOOD, .kinds = "selected coact"},
        {"lost domains", "/domains: missing", GOOD, .no_domains = true},
        {"lost digest", "digest: missing", GOOD, .no_digest = true},
        {"lower case", "not written as", GOOD, .link = "a%2fb"},
        {"needless", "not written as", GOOD, .link = "%41"},
        {"bare percent", "not written as", GOOD, .link = "100%"},
    };
#pragma GCC diagnostic pop
    for (size_t i = 0; i < MOEC_COUNT(all); i++) {
        moec_stats *s;
        moec_err err = {MOEC_OK, ""};
        forge(&all[i]);
        moec_status st = moec_stats_load(&s, path_a, &err);
        if (st != (all[i].expect ? MOEC_EFORMAT : MOEC_OK) || (all[i].expect && !strstr(err.text, all[i].expect)))
            fail_msg("%s: %d %s", all[i].name, (int)st, err.text);
        if (st == MOEC_OK) {
            assert_string_equal(s->domain[0].name, "a/b");
            assert_null(s->domain[0].data[MOEC_STAT_COACT]);
        }
        moec_stats_free(s);
    }
}

/* ---- the disk, the memory ----------------------------------------------------------------------------------------- */

static void a_full_disk_is_said(void **state)
{
    (void)state;
    seed = 51;
    moec_stats *s = make_stats(1, 2, two_names), *again;
    moec_err err;
    size_t n;
    struct rlimit was, small;
    save(s, path_a);
    moec_free(bytes_of(path_a, &n));
    signal(SIGXFSZ, SIG_IGN); /* writes behind the limit then fail as they do on a full disk */
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
    small = was;
    for (size_t limit = 0; limit < n; limit += limit < 4096 ? 512 : n / 7) {
        err = (moec_err){MOEC_OK, ""};
        small.rlim_cur = limit;
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
        moec_status st = moec_stats_save(s, path_b, &err);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
        if (st != MOEC_ENOFIT)
            fail_msg("limit %zu: %d %s", limit, (int)st, err.text);
        snprintf(path_tmp, sizeof path_tmp, "%s.tmp", path_b);
        assert_false(moec_path_exists(path_tmp));
    }
    save(s, path_b); /* the library is none the worse */
    again = load(path_b);
    assert_same(s, again);
    moec_stats_free(again);
    assert_int_equal(moec_stats_save(s, "/nonexistent/folder/x", &err), MOEC_EIO);
    assert_non_null(strstr(err.text, "No such file"));
    moec_stats_free(s);
}

static void describes(void **state)
{
    (void)state;
    seed = 61;
    moec_stats *s = make_stats(0, 2, two_names);
    for (int d = 0; d < 2; d++)
        for (int64_t i = 0; i < 12; i++)
            ((uint64_t *)s->domain[d].data[MOEC_STAT_SELECTED])[i] = i < 4 ? 0 : i == 5 ? 0 : (uint64_t)(10 * i + d);
    moec_json *v;
    char *text;
    int64_t n;
    double x;
    assert_int_equal(moec_stats_describe(&v, s, 100, NULL), MOEC_OK);
    moec_json *c = moec_json_get(v, "coverage"), *layers = moec_json_get(v, "layers"), *row = moec_json_at(layers, 1);
    assert_true(moec_json_int(moec_json_get(c, "never"), &n) && n == 5);
    assert_true(moec_json_int(moec_json_get(c, "below_floor"), &n) && n == 6); /* 81 tokens of expert 0 in layer 2 too */
    moec_json *last = moec_json_at(moec_json_get(c, "never_experts"), 4);
    assert_true(moec_json_int(moec_json_get(last, "layer"), &n) && n == 2);
    assert_true(moec_json_int(moec_json_get(last, "expert"), &n) && n == 1);
    assert_true(moec_json_int(moec_json_get(row, "min"), &n) && n == 0);
    assert_true(moec_json_int(moec_json_get(row, "max"), &n) && n == 141);
    assert_true(moec_json_real(moec_json_get(row, "median"), &x) && x == (81 + 121) / 2.0);
    assert_true(moec_json_real(moec_json_get(row, "cv"), &x));
    const double count[] = {0, 81, 121, 141}, mean = 343.0 / 4;
    double sq = 0;
    for (int e = 0; e < 4; e++)
        sq += (count[e] - mean) * (count[e] - mean);
    assert_true(fabs(x - sqrt(sq / 4) / mean) < 1e-12);
    assert_true(moec_json_real(moec_json_get(row, "entropy"), &x));
    double p[] = {81 / 343.0, 121 / 343.0, 141 / 343.0};
    assert_true(fabs(x + (p[0] * log(p[0]) + p[1] * log(p[1]) + p[2] * log(p[2])) / log(4)) < 1e-12);
    moec_json *top = moec_json_get(row, "top");
    assert_int_equal(moec_json_len(top), 3);
    assert_true(moec_json_int(moec_json_get(moec_json_at(top, 0), "expert"), &n) && n == 3);
    assert_int_equal(moec_json_type(moec_json_get(moec_json_at(layers, 0), "cv")), MOEC_JSON_NULL);
    assert_int_equal(moec_json_len(moec_json_get(v, "domains")), 2);
    assert_int_equal(moec_json_dump(&text, v, 2, NULL), MOEC_OK);
    moec_free(text);
    moec_json_free(v);
    moec_stats_free(s);
}

static moec_status whole_life(moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_stats *s = NULL, *again = NULL;
    moec_stats_meta m = make_meta(1);
    char *dropped = NULL;
    static const char *const other[] = {"code", "y"};
    moec_json *v = NULL;
    MOEC_TRY(moec_stats_new(&s, &m, 1, two_names, err));
    MOEC_TRY(moec_stats_save(s, path_a, err));
    MOEC_TRY(moec_stats_load(&again, path_a, err));
    moec_stats_free(again);
    again = NULL;
    m.tier = 0;
    MOEC_TRY(moec_stats_new(&again, &m, 2, other, err));
    MOEC_TRY(moec_stats_merge(s, again, &dropped, err));
    MOEC_TRY(moec_stats_describe(&v, s, 10, err));
done:
    moec_json_free(v);
    moec_free(dropped);
    moec_stats_free(again);
    moec_stats_free(s);
    return st;
}

static void survives_every_allocation_failure(void **state)
{
    (void)state;
    moec_status st = MOEC_ENOMEM;
    for (long i = 0; st == MOEC_ENOMEM; i++) {
        moec_err err = {MOEC_OK, ""};
        moec_test_allocs_left = i;
        st = whole_life(&err);
        moec_test_allocs_left = LONG_MAX;
        assert_true(st == MOEC_OK || err.text[0]);
    }
    assert_int_equal(st, MOEC_OK);
}

static int make_folder(void **state)
{
    (void)state;
    if (!mkdtemp(folder))
        return 1;
    snprintf(path_a, sizeof path_a, "%s/a.h5", folder);
    snprintf(path_b, sizeof path_b, "%s/b.h5", folder);
    snprintf(path_tmp, sizeof path_tmp, "%s.tmp", path_a);
    return 0;
}

static int remove_folder(void **state)
{
    (void)state;
    return moec_dir_remove(folder, NULL) != MOEC_OK;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_row_is_sound),
        cmocka_unit_test(starts_empty),
        cmocka_unit_test(refuses_bad_meta),
        cmocka_unit_test(merging_adds),
        cmocka_unit_test(merging_commutes_and_associates),
        cmocka_unit_test(merging_drops_what_one_lacks),
        cmocka_unit_test(errors_merge_with_their_like),
        cmocka_unit_test(merging_refuses_strangers),
        cmocka_unit_test(counts_stop_at_the_top),
        cmocka_unit_test(files_come_back),
        cmocka_unit_test(odd_contents_come_back),
        cmocka_unit_test(damage_is_found),
        cmocka_unit_test(numbers_are_checked),
        cmocka_unit_test(forgeries_are_refused),
        cmocka_unit_test(a_full_disk_is_said),
        cmocka_unit_test(describes),
        cmocka_unit_test(survives_every_allocation_failure),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
