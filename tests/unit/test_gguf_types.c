/* Types of a GGUF's tensors: the program against all choices and against one type for all, rules, budgets at their borders, pairs,
 * MXFP4 that stays, rows that no large block divides; what is refused. */
#include "base/mem.h"
#include "run/gguf_types.h"
#include "tiny.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

typedef struct fixture {
    char *dir;
    moec_model *m;
    moec_gguf_model *x;
    moec_sensitivity *s;
} fixture;

/* Errors that fall with the bits of a type, each matrix with another weight. */
static void make_costs(fixture *f)
{
    moec_err err = {MOEC_OK, ""};
    size_t n = 0;
    for (size_t i = 0; i < moec_gguf_model_count(f->x); i++)
        n += moec_gguf_model_matrix(f->x, i);
    assert_int_equal(moec_sensitivity_new(&f->s, n, &err), MOEC_OK);
    f->s->tokens = 100;
    for (size_t i = 0, k = 0; i < moec_gguf_model_count(f->x); i++) {
        const moec_gguf_tensor *t = moec_gguf_model_at(f->x, i);
        if (!moec_gguf_model_matrix(f->x, i))
            continue;
        moec_sensitive *row = &f->s->at[k];
        assert_int_equal(moec_copy(&row->name, t->name, strlen(t->name), &err), MOEC_OK);
        row->cols = t->dim[0];
        for (int b = 0; b < MOEC_BLOCK_COUNT; b++)
            if (moec_blocks_bytes((moec_block)b, t->dim[0]) >= 0)
                row->error[b] = pow(4.0, -8.0 * moec_blocks[b].bytes / moec_blocks[b].elements) * (1.0 + 0.3 * (double)((k * 7 + (size_t)b * 3) % 5));
        row->probe[0] = pow(4.0, -2.0);
        row->probe[1] = pow(4.0, -4.0);
        row->kl[0] = 0.01 * (1.0 + (double)((k * 5) % 7));
        row->kl[1] = row->kl[0] / (12.0 + (double)(k % 4));
        k++;
    }
}

/* hidden 64: rows that blocks of 32 divide; 256: blocks of 256 divide some. */
static void set_up(fixture *f, const char *family, int64_t layers, int64_t hidden)
{
    moec_err err = {MOEC_OK, ""};
    *f = (fixture){.dir = tiny_folder()};
    const tiny_spec spec = {.family = family, .layers = layers, .experts = 4, .hidden = hidden, .heads = 4, .kv_heads = 2, .head_dim = hidden / 4,
                            .width = 96, .untied = true};
    if (tiny_write(f->dir, &spec, &err) != MOEC_OK || moec_model_open(&f->m, f->dir, &err) != MOEC_OK ||
        moec_gguf_model_new(&f->x, f->m, MOEC_GGML_F16, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    make_costs(f);
}

static void tear_down(fixture *f)
{
    moec_sensitivity_free(f->s);
    moec_gguf_model_free(f->x);
    moec_model_close(f->m);
    tiny_remove(f->dir);
    moec_free(f->dir);
}

static int64_t bytes_at(const moec_gguf_model *x, size_t i, moec_block type)
{
    const moec_gguf_tensor *t = moec_gguf_model_at(x, i);
    const int64_t n = moec_blocks_bytes(type, t->dim[0]) * t->dim[1] * t->dim[2];
    return (n + 31) / 32 * 32;
}

static double cost_at(const fixture *f, size_t i, moec_block type)
{
    return moec_sensitivity_cost(moec_sensitivity_find(f->s, moec_gguf_model_at(f->x, i)->name), type);
}

static double values(const fixture *f)
{
    double n = 0.0;
    for (size_t i = 0; i < moec_gguf_model_count(f->x); i++) {
        const moec_gguf_tensor *t = moec_gguf_model_at(f->x, i);
        if (moec_gguf_model_matrix(f->x, i))
            n += (double)(t->dim[0] * t->dim[1] * t->dim[2]);
    }
    return n;
}

/* Best cost of matrices from i on within `left` bytes, of three types. */
static double best(const fixture *f, const moec_block *types, size_t i, int64_t left)
{
    while (i < moec_gguf_model_count(f->x) && !moec_gguf_model_matrix(f->x, i))
        i++;
    if (i == moec_gguf_model_count(f->x))
        return 0.0;
    double least = HUGE_VAL;
    for (int k = 0; k < 3; k++) {
        const int64_t rest = left - bytes_at(f->x, i, types[k]);
        const double c = rest < 0 ? HUGE_VAL : cost_at(f, i, types[k]) + best(f, types, i + 1, rest);
        least = c < least ? c : least;
    }
    return least;
}

static uint32_t bit(moec_block b)
{
    return UINT32_C(1) << b;
}

static const moec_block three[] = {MOEC_BLOCK_IQ4_NL, MOEC_BLOCK_Q5_1, MOEC_BLOCK_Q8_0};

static moec_gguf_types chosen(const fixture *f, const moec_gguf_types_request *r)
{
    moec_gguf_types t;
    moec_err err = {MOEC_OK, ""};
    if (moec_gguf_types_choose(&t, f->x, r, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    return t;
}

static void is_the_best_of_all_choices(void **state)
{
    (void)state;
    fixture f;
    set_up(&f, "mixtral", 1, 64);
    for (double bits = 4.6; bits < 8.5; bits += 0.37) {
        const moec_gguf_types_request r = {.sensitivity = f.s, .candidates = bit(three[0]) | bit(three[1]) | bit(three[2]), .bits = bits};
        moec_gguf_types t = chosen(&f, &r);
        int64_t bytes = 0;
        double cost = 0.0;
        for (size_t i = 0; i < t.n; i++)
            if (moec_gguf_model_matrix(f.x, i)) {
                bytes += bytes_at(f.x, i, t.type[i]);
                cost += cost_at(&f, i, t.type[i]);
            } else {
                assert_int_equal(t.type[i], MOEC_BLOCK_COUNT);
            }
        const int64_t budget = (int64_t)floor(bits * values(&f) / 8.0);
        assert_true(bytes <= budget);
        assert_true(fabs(cost - t.cost) <= 1e-12 * cost && t.proven);
        assert_true(fabs(t.bits - 8.0 * (double)bytes / values(&f)) < 1e-12);
        assert_true(fabs(t.cost - best(&f, three, 0, budget)) <= 1e-9 * t.cost);
        moec_gguf_types_release(&t);
    }
    tear_down(&f);
}

static void is_never_worse_than_one_type_for_all(void **state)
{
    (void)state;
    fixture f;
    set_up(&f, "qwen3_moe", 2, 256);
    for (int b = 0; b < MOEC_BLOCK_COUNT; b++) {
        int64_t bytes = 0;
        double cost = 0.0;
        for (size_t i = 0; i < moec_gguf_model_count(f.x); i++)
            if (moec_gguf_model_matrix(f.x, i)) {
                const moec_block type = moec_blocks_fall_back((moec_block)b, moec_gguf_model_at(f.x, i)->dim[0]);
                bytes += bytes_at(f.x, i, type);
                cost += cost_at(&f, i, type);
            }
        const moec_gguf_types_request r = {.sensitivity = f.s, .candidates = (UINT32_C(1) << MOEC_BLOCK_COUNT) - 1,
                                           .bits = 8.0 * (double)bytes / values(&f) + 1e-9};
        if (r.bits > 16.0)
            continue;
        moec_gguf_types t = chosen(&f, &r);
        if (t.cost > cost * (1.0 + 1e-9))
            fail_msg("%s: %g, one for all has %g", moec_blocks[b].name, t.cost, cost);
        moec_gguf_types_release(&t);
    }
    tear_down(&f);
}

static void a_target_counts_everything(void **state)
{
    (void)state;
    fixture f;
    set_up(&f, "mixtral", 2, 64);
    int64_t plain = 0, least = 0;
    for (size_t i = 0; i < moec_gguf_model_count(f.x); i++) {
        const moec_gguf_tensor *t = moec_gguf_model_at(f.x, i);
        if (moec_gguf_model_matrix(f.x, i))
            least += bytes_at(f.x, i, MOEC_BLOCK_IQ4_NL);
        else
            plain += (t->dim[0] * t->dim[1] * t->dim[2] * 4 + 31) / 32 * 32;
    }
    moec_gguf_types_request r = {.sensitivity = f.s, .candidates = bit(MOEC_BLOCK_IQ4_NL) | bit(MOEC_BLOCK_Q8_0), .fixed = 5000,
                                 .target = (uint64_t)(plain + least) + 5000};
    moec_gguf_types t = chosen(&f, &r);
    assert_int_equal(t.bytes, plain + least);
    moec_gguf_types_release(&t);
    moec_err err = {MOEC_OK, ""};
    r.target--;
    assert_int_equal(moec_gguf_types_choose(&t, f.x, &r, &err), MOEC_ENOFIT);
    assert_non_null(strstr(err.text, "below the least"));
    assert_null(t.type);
    err = (moec_err){MOEC_OK, ""};
    r.target = UINT64_C(1) << 40;
    assert_int_equal(moec_gguf_types_choose(&t, f.x, &r, &err), MOEC_ENOFIT);
    assert_non_null(strstr(err.text, "above the model at F16"));
    r.target = (uint64_t)(plain + least) + 5000 + 3000;
    t = chosen(&f, &r);
    assert_true(t.bytes <= r.target - r.fixed);
    moec_gguf_types_release(&t);
    tear_down(&f);
}

static moec_block type_of(const fixture *f, const moec_gguf_types *t, const char *name)
{
    for (size_t i = 0; i < t->n; i++)
        if (strcmp(moec_gguf_model_at(f->x, i)->name, name) == 0)
            return t->type[i];
    return MOEC_BLOCK_COUNT;
}

static void rules_say_it(void **state)
{
    (void)state;
    fixture f;
    set_up(&f, "mixtral", 2, 64);
    moec_gguf_rules_list rules;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_gguf_rules_read(&rules, "q4_1,ffn_(gate|up)_exps=Q5_0,blk\\.[0,1]{1,1}\\.attn_q=q8_0,blk.1.*attn_q=q5_1,output=f16", &err),
                     MOEC_OK);
    assert_true(rules.all && rules.usual == MOEC_BLOCK_Q4_1 && rules.n == 4);
    moec_gguf_types_request r = {.rules = &rules};
    moec_gguf_types t = chosen(&f, &r);
    assert_true(isnan(t.cost));
    assert_int_equal(type_of(&f, &t, "token_embd.weight"), MOEC_BLOCK_Q4_1);
    assert_int_equal(type_of(&f, &t, "blk.0.ffn_up_exps.weight"), MOEC_BLOCK_Q5_0);
    assert_int_equal(type_of(&f, &t, "blk.0.ffn_down_exps.weight"), MOEC_BLOCK_Q4_1);
    assert_int_equal(type_of(&f, &t, "blk.0.attn_q.weight"), MOEC_BLOCK_Q8_0);
    assert_int_equal(type_of(&f, &t, "blk.1.attn_q.weight"), MOEC_BLOCK_Q5_1);
    assert_int_equal(type_of(&f, &t, "output.weight"), MOEC_BLOCK_F16);
    assert_int_equal(moec_gguf_types_set(f.x, &t, &err), MOEC_OK);
    for (size_t i = 0; i < t.n; i++)
        assert_int_equal(moec_gguf_model_at(f.x, i)->type, t.type[i] == MOEC_BLOCK_COUNT ? 0 : moec_blocks[t.type[i]].ggml);
    moec_gguf_types_release(&t);
    r.sensitivity = f.s; /* and a budget for the rest */
    r.bits = 6.0;
    rules.all = false;
    t = chosen(&f, &r);
    assert_int_equal(type_of(&f, &t, "blk.1.attn_q.weight"), MOEC_BLOCK_Q5_1);
    assert_true(t.bits <= 6.0 && t.bits > 5.0 && t.cost > 0.0);
    moec_gguf_types_release(&t);
    r.bits = 0.0;
    assert_int_equal(moec_gguf_types_choose(&t, f.x, &r, &err), MOEC_EINVAL); /* nothing says what the others are */
    moec_gguf_rules_release(&rules);
    static const struct {
        const char *text, *says;
    } wrong[] = {{"q4_kk", "did you mean q4_k"}, {"", "empty"}, {"q4_k,", "empty"}, {"a=", "empty"}, {"=q4_k", "empty"}, {"a=q4_k,q5_k", "stands first"},
                 {"(=q4_k", "no regular expression"}, {"a=q9", "no type"}};
    for (size_t i = 0; i < MOEC_COUNT(wrong); i++) {
        err = (moec_err){MOEC_OK, ""};
        assert_int_equal(moec_gguf_rules_read(&rules, wrong[i].text, &err), MOEC_EINVAL);
        if (!strstr(err.text, wrong[i].says))
            fail_msg("%s: %s", wrong[i].text, err.text);
    }
    assert_int_equal(moec_gguf_rules_read(&rules, "q4_k,nothing_of_that_name=q8_0", &err), MOEC_OK);
    err = (moec_err){MOEC_OK, ""};
    assert_int_equal(moec_gguf_types_choose(&t, f.x, &(moec_gguf_types_request){.rules = &rules}, &err), MOEC_EINVAL);
    assert_non_null(strstr(err.text, "matches no tensor"));
    moec_gguf_rules_release(&rules);
    tear_down(&f);
}

static void narrow_rows_fall_back(void **state)
{
    (void)state;
    fixture f;
    set_up(&f, "qwen3_moe", 2, 256);
    moec_gguf_rules_list rules;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_gguf_rules_read(&rules, "q4_k", &err), MOEC_OK);
    moec_gguf_types t = chosen(&f, &(moec_gguf_types_request){.rules = &rules});
    size_t fell = 0;
    for (size_t i = 0; i < t.n; i++)
        if (moec_gguf_model_matrix(f.x, i)) {
            assert_int_equal(t.type[i], moec_blocks_fall_back(MOEC_BLOCK_Q4_K, moec_gguf_model_at(f.x, i)->dim[0]));
            assert_int_equal(t.asked[i], MOEC_BLOCK_Q4_K);
            fell += t.type[i] != MOEC_BLOCK_Q4_K;
        }
    assert_int_equal(t.fell_back, fell);
    assert_true(fell == 2); /* down of both layers: rows of 96 */
    moec_gguf_types_release(&t);
    moec_gguf_rules_release(&rules);
    tear_down(&f);
}

static void pairs_share_a_type(void **state)
{
    (void)state;
    fixture f;
    char name[64];
    set_up(&f, "mixtral", 2, 64);
    moec_gguf_types_request r = {.sensitivity = f.s, .bits = 5.7};
    moec_gguf_types apart = chosen(&f, &r);
    r.pair = true;
    moec_gguf_types t = chosen(&f, &r);
    assert_true(t.cost >= apart.cost * (1.0 - 1e-9) && t.bits <= 5.7);
    for (int64_t l = 0; l < f.m->dims.layers; l++) {
        snprintf(name, sizeof name, "blk.%d.ffn_gate_exps.weight", (int)l);
        const moec_block gate = type_of(&f, &t, name);
        snprintf(name, sizeof name, "blk.%d.ffn_up_exps.weight", (int)l);
        assert_int_equal(gate, type_of(&f, &t, name));
        assert_int_not_equal(gate, MOEC_BLOCK_COUNT);
    }
    moec_gguf_types_release(&apart);
    moec_gguf_types_release(&t);
    tear_down(&f);
}

static void what_cannot_be_chosen_is_refused(void **state)
{
    (void)state;
    fixture f;
    moec_gguf_types t;
    moec_err err = {MOEC_OK, ""};
    set_up(&f, "mixtral", 2, 64);
    assert_int_equal(moec_gguf_types_choose(&t, f.x, &(moec_gguf_types_request){.bits = 4.0}, &err), MOEC_EINVAL);
    moec_gguf_types_request r = {.sensitivity = f.s, .bits = 2.0};
    err = (moec_err){MOEC_OK, ""};
    assert_int_equal(moec_gguf_types_choose(&t, f.x, &r, &err), MOEC_ENOFIT);
    r.bits = 20.0;
    assert_int_equal(moec_gguf_types_choose(&t, f.x, &r, &err), MOEC_ENOFIT);
    r.bits = 6.0;
    f.s->at[3].kl[0] = f.s->at[3].kl[1] = (double)NAN;
    err = (moec_err){MOEC_OK, ""};
    assert_int_equal(moec_gguf_types_choose(&t, f.x, &r, &err), MOEC_EINVAL);
    assert_non_null(strstr(err.text, f.s->at[3].name));
    f.s->at[2].name[4] = '9'; /* of another model */
    err = (moec_err){MOEC_OK, ""};
    assert_int_equal(moec_gguf_types_choose(&t, f.x, &r, &err), MOEC_EINVAL);
    assert_non_null(strstr(err.text, "another model"));
    assert_null(t.type);
    tear_down(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(is_the_best_of_all_choices),
        cmocka_unit_test(is_never_worse_than_one_type_for_all),
        cmocka_unit_test(a_target_counts_everything),
        cmocka_unit_test(rules_say_it),
        cmocka_unit_test(narrow_rows_fall_back),
        cmocka_unit_test(pairs_share_a_type),
        cmocka_unit_test(what_cannot_be_chosen_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
