/* What an interrupted calibration leaves, and who may continue it: every run ends with the bytes of an undisturbed one. */
#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"
#include "calib/calibrate.h"
#include "tiny.h"

#include <fcntl.h>
#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include <cmocka.h>

enum { LAYERS = 5, TOKENS = 4096, WINDOW = 64, HIDDEN = 128 };

static int32_t ids[TOKENS];
static int64_t start[TOKENS / WINDOW + 1];
static char name[] = "a";
static moec_domain domain = {.name = name, .path = name, .weight = 1, .ids = ids, .n_ids = TOKENS, .start = start,
                             .n_windows = TOKENS / WINDOW};
static moec_corpus corpus = {1, &domain};

typedef struct place {
    char *dir, *model, *stats, *partial, *want;
    size_t n_want;
    moec_model *m;
} place;

/* A limit under which hidden states go to disk: halfway between what the run takes with and without them. Asked for right
 * before a run, because it counts from what is resident. */
static uint64_t spill(const place *p)
{
    moec_pass_plan plan;
    size_t statistics;
    const moec_calibrate_opts o = {.options = "{}"};
    assert_int_equal(moec_calibrate_plan(&plan, &statistics, p->m, &corpus, &o, NULL), MOEC_OK);
    return plan.bytes - (uint64_t)TOKENS * HIDDEN * sizeof(float) / 2;
}

static moec_status run(place *p, uint64_t max_memory, bool keep, moec_err *err)
{
    moec_calibrate_opts o = {.options = "{}", .resume = true, .checkpoint_every = 0, .max_memory = max_memory, .keep_existing = keep};
    return moec_calibrate(NULL, p->m, &corpus, p->stats, &o, err);
}

static int64_t layers_done(const place *p)
{
    moec_json *v;
    int64_t done = -1;
    char *path = tiny_path(p->partial, "state.json");
    if (moec_json_read(&v, path, 1 << 16, NULL) == MOEC_OK) {
        (void)moec_json_int(moec_json_get(v, "layers_done"), &done);
        moec_json_free(v);
    }
    moec_free(path);
    return done;
}

/* Runs until a checkpoint of at least `layers` layers is there and stops as a kill would: by refusing memory. */
static void stop_after(place *p, int64_t layers, bool disk)
{
    moec_err err = {MOEC_OK, ""};
    for (long k = 100; layers_done(p) < layers; k += 40) {
        uint64_t limit = disk ? spill(p) : 0;
        moec_test_allocs_left = k;
        moec_status st = run(p, limit, false, &err);
        moec_test_allocs_left = LONG_MAX;
        assert_int_equal(st, MOEC_ENOMEM);
        assert_true(k < 100000);
    }
}

static void same_bytes(const place *p)
{
    char *got;
    size_t n;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_file_read(&got, &n, p->stats, (size_t)1 << 30, &err), MOEC_OK);
    assert_int_equal(n, p->n_want);
    assert_memory_equal(got, p->want, n);
    assert_false(moec_path_exists(p->partial));
    moec_free(got);
    unlink(p->stats);
}

static void continues(place *p, bool disk)
{
    moec_err err = {MOEC_OK, ""};
    if (run(p, disk ? spill(p) : 0, false, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    same_bytes(p);
}

/* Hidden states move between memory and disk when the limit changes. */
static void limits_may_change_between_runs(void **state)
{
    place *p = *state;
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            stop_after(p, 2, i == 1);
            char *path = tiny_path(p->partial, "hidden.0");
            assert_int_equal(moec_path_exists(path), i == 1);
            moec_free(path);
            continues(p, j == 1);
        }
}

/* A hidden.N of the right size that an earlier run on disk left is not the state of a later checkpoint from memory. */
static void stale_states_are_not_taken(void **state)
{
    place *p = *state;
    stop_after(p, 3, true);
    char *carry[2] = {tiny_path(p->partial, "carry.0"), tiny_path(p->partial, "carry.1")};
    for (int i = 0; i < 2; i++) { /* so that the checkpoint cannot be loaded and the run in memory starts anew */
        assert_int_equal(moec_file_write(carry[i], "x", 1, NULL), MOEC_OK);
        moec_free(carry[i]);
    }
    moec_err err = {MOEC_OK, ""};
    moec_test_allocs_left = 150; /* far enough to see the damage and to start, not to end */
    assert_int_equal(run(p, 0, false, &err), MOEC_ENOMEM);
    moec_test_allocs_left = LONG_MAX;
    stop_after(p, 1, false);
    continues(p, true);
}

static void a_folder_at_work_is_left_alone(void **state)
{
    place *p = *state;
    moec_err err = {MOEC_OK, ""};
    stop_after(p, 1, false);
    int fd = open(p->partial, O_RDONLY | O_DIRECTORY);
    assert_true(fd >= 0);
    assert_int_equal(flock(fd, LOCK_EX | LOCK_NB), 0);
    assert_int_equal(run(p, 0, false, &err), MOEC_EEXIST);
    assert_non_null(strstr(err.text, "another run is at work there"));
    close(fd);
    assert_true(layers_done(p) >= 1);
    continues(p, false);
}

/* A kill between publishing the result and removing the folder must not leave a command that refuses to run again. */
static void finished_files_may_be_completed(void **state)
{
    place *p = *state;
    moec_err err = {MOEC_OK, ""};
    assert_int_equal(moec_file_write(p->stats, "old", 3, &err), MOEC_OK);
    assert_int_equal(run(p, 0, true, &err), MOEC_EEXIST);
    assert_non_null(strstr(err.text, "is there already"));
    assert_false(moec_path_exists(p->partial));
    assert_true(moec_path_exists(p->stats));
    stop_after(p, 2, false);
    assert_true(moec_calibrate_unfinished(p->stats));
    if (run(p, 0, true, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    same_bytes(p);
}

/* The fingerprint is of the tensors: a config edited between two runs must not be missed. */
static void an_edited_config_starts_anew(void **state)
{
    place *p = *state;
    moec_err err = {MOEC_OK, ""};
    char *text, *edited, *path = tiny_path(p->model, "config.json");
    size_t n;
    stop_after(p, 2, false);
    assert_int_equal(moec_file_read(&text, &n, path, 1 << 20, &err), MOEC_OK);
    assert_int_equal(moec_json_edit(&edited, text, "num_experts_per_tok", "3", &err), MOEC_OK);
    assert_int_equal(moec_file_write(path, edited, strlen(edited), &err), MOEC_OK);
    moec_model_close(p->m);
    assert_int_equal(moec_model_open(&p->m, p->model, &err), MOEC_OK);
    stop_after(p, 1, false);
    assert_int_equal(moec_file_write(path, text, n, &err), MOEC_OK);
    moec_model_close(p->m);
    assert_int_equal(moec_model_open(&p->m, p->model, &err), MOEC_OK);
    continues(p, false);
    moec_free(text);
    moec_free(edited);
    moec_free(path);
}

static int set_up_as(void **state, const char *family)
{
    static place p;
    moec_err err = {MOEC_OK, ""};
    const tiny_spec spec = {.family = family, .layers = LAYERS, .seed = 3, .hidden = HIDDEN};
    for (int i = 0; i < TOKENS; i++)
        ids[i] = (i * 37 + i / 64 * 11) % 64;
    for (int i = 0; i <= TOKENS / WINDOW; i++)
        start[i] = i * WINDOW;
    p.dir = tiny_folder();
    p.model = tiny_path(p.dir, "model");
    p.stats = tiny_path(p.dir, "stats.h5");
    p.partial = tiny_path(p.dir, "stats.h5.partial");
    *state = &p;
    moec_par_set_threads(1); /* fewer threads are another way to save memory */
    if (tiny_write(p.model, &spec, &err) != MOEC_OK || moec_model_open(&p.m, p.model, &err) != MOEC_OK ||
        run(&p, 0, false, &err) != MOEC_OK || moec_file_read(&p.want, &p.n_want, p.stats, 1 << 28, &err) != MOEC_OK) {
        print_error("%s\n", err.text);
        return -1;
    }
    unlink(p.stats);
    return 0;
}

static int set_up(void **state)
{
    return set_up_as(state, NULL);
}

/* A model whose router needs the logits of the layer before: they are part of the state. */
static int set_up_carried(void **state)
{
    return set_up_as(state, "MoE++");
}

static int tear_down(void **state)
{
    place *p = *state;
    moec_model_close(p->m);
    tiny_remove(p->dir);
    moec_free(p->want);
    moec_free(p->partial);
    moec_free(p->stats);
    moec_free(p->model);
    moec_free(p->dir);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(limits_may_change_between_runs), cmocka_unit_test(stale_states_are_not_taken),
        cmocka_unit_test(a_folder_at_work_is_left_alone), cmocka_unit_test(finished_files_may_be_completed),
        cmocka_unit_test(an_edited_config_starts_anew),
    };
    const struct CMUnitTest carried[] = {
        cmocka_unit_test(limits_may_change_between_runs), cmocka_unit_test(stale_states_are_not_taken),
    };
    moec_log_set(MOEC_QUIET);
    return cmocka_run_group_tests(tests, set_up, tear_down) + cmocka_run_group_tests(carried, set_up_carried, tear_down);
}
