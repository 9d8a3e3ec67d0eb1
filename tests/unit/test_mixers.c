/* Mixers that carry a state along a sequence (short convolution, gated delta net) run over blocks of tokens that know no
 * sequences: what a window's states are must not depend on where blocks begin, nor on the windows before. Against
 * transformers they are checked with all families, in test_families.c. */
#include "base/mem.h"
#include "calib/pass.h"
#include "tiny.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { LONGEST = 600, WINDOWS = 8 };

static void must(moec_status st, const moec_err *err)
{
    if (st != MOEC_OK)
        print_error("%s\n", err->text);
    assert_int_equal(st, MOEC_OK);
}

/* Hidden states behind the last layer of windows that all begin with the same ids; free with moec_free. */
static float *states(const moec_model *m, const int64_t *length, int n, int64_t tokens)
{
    moec_err err = {MOEC_OK, ""};
    static int32_t ids[WINDOWS * LONGEST];
    int64_t start[WINDOWS + 1] = {0};
    char name[] = "text";
    for (int w = 0; w < n; w++) {
        for (int64_t i = 0; i < length[w]; i++)
            ids[start[w] + i] = (int32_t)((i * i + 7 * i) % m->dims.vocab);
        start[w + 1] = start[w] + length[w];
    }
    moec_domain domain = {.name = name, .path = name, .weight = 1, .ids = ids, .n_ids = start[n], .n_windows = n,
                          .start = start};
    const moec_corpus corpus = {1, &domain};
    const moec_pass_opts o = {.compute = MOEC_COMPUTE_F32, .watch = true, .what = "test"};
    moec_pass *p;
    float *h;
    must(moec_pass_new(&p, m, &corpus, &o, &err), &err);
    must(moec_pass_embed(p, &err), &err);
    moec_pass_begin(p, 0);
    for (int64_t i = 0; i < m->dims.layers; i++)
        must(moec_pass_layer(p, i, NULL, NULL, NULL, &err), &err);
    moec_pass_end(p);
    must(MOEC_NEW(h, (size_t)(tokens * m->dims.hidden), &err), &err);
    must(moec_hidden_read(h, p->hidden, start[n] - tokens, tokens, &err), &err);
    moec_pass_free(p);
    return h;
}

static void check_family(const char *family, moec_mixer mixer)
{
    moec_err err = {MOEC_OK, ""};
    char *dir = tiny_folder();
    const tiny_spec spec = tiny_of(family);
    moec_model *m;
    must(tiny_write(dir, &spec, &err), &err);
    must(moec_model_open(&m, dir, &err), &err);
    bool there = false;
    for (int64_t i = 0; i < m->dims.layers; i++)
        there = there || m->layer[i].mixer == mixer;
    assert_true(there);
    static const int64_t whole[] = {LONGEST};
    static const int64_t before[][3] = {{255, LONGEST, 0}, {1, 254, LONGEST}, {256, LONGEST, 0}, {3, LONGEST, 0}};
    size_t row = (size_t)m->dims.hidden * sizeof(float);
    float *want = states(m, whole, 1, LONGEST);
    for (size_t i = 0; i < MOEC_COUNT(before); i++) { /* the same window behind others */
        float *got = states(m, before[i], before[i][2] ? 3 : 2, LONGEST);
        assert_memory_equal(got, want, LONGEST * row);
        moec_free(got);
    }
    static const int64_t cut[] = {1, 2, 3, 255, 256, 257, 259, 512, 513};
    for (size_t i = 0; i < MOEC_COUNT(cut); i++) { /* what comes later changes no more than attention's rounding */
        float *got = states(m, &cut[i], 1, cut[i]);
        for (int64_t j = 0; j < cut[i] * m->dims.hidden; j++)
            assert_true(fabsf(got[j] - want[j]) <= 1e-3f * (1 + fabsf(want[j])));
        moec_free(got);
    }
    moec_free(want);
    moec_model_close(m);
    tiny_remove(dir);
    moec_free(dir);
}

static void convolutions_carry_their_past(void **state)
{
    (void)state;
    check_family("lfm2_moe", MOEC_MIXER_CONV);
}

static void delta_nets_carry_their_state(void **state)
{
    (void)state;
    check_family("qwen3_next", MOEC_MIXER_DELTA);
    check_family("qwen3_5_moe_text", MOEC_MIXER_DELTA);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(convolutions_carry_their_past),
        cmocka_unit_test(delta_nets_carry_their_state),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
