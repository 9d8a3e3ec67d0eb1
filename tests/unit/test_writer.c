/* The folder writer: what it writes is what was listed, for any cut of ranges; what it must not touch it refuses; a run that
 * died is taken up; the check sees every byte. */
#include "base/file.h"
#include "base/mem.h"
#include "base/par.h"
#include "ckpt/writer.h"
#include "support/tiny.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

enum { SOURCE_BYTES = 20 << 20 };

static char *folder, *source_dir, *out;
static unsigned char *source;
static int fd;

static uint64_t state64 = 5;

static uint64_t noise(void)
{
    state64 ^= state64 << 13;
    state64 ^= state64 >> 7;
    return state64 ^= state64 << 17;
}

static int set_up(void **state)
{
    (void)state;
    folder = tiny_folder();
    source_dir = tiny_path(folder, "source");
    out = tiny_path(folder, "out");
    char *path = tiny_path(source_dir, "bytes");
    if (moec_dir_make(source_dir, NULL) != MOEC_OK || MOEC_NEW(source, SOURCE_BYTES, NULL) != MOEC_OK)
        return 1;
    for (size_t i = 0; i < SOURCE_BYTES; i += 8) {
        uint64_t v = noise();
        memcpy(source + i, &v, 8);
    }
    moec_status st = moec_file_write(path, source, SOURCE_BYTES, NULL);
    fd = open(path, O_RDONLY);
    moec_free(path);
    return st == MOEC_OK && fd >= 0 ? 0 : 1;
}

static int tear_down(void **state)
{
    (void)state;
    close(fd);
    tiny_remove(folder);
    moec_free(folder);
    moec_free(source_dir);
    moec_free(out);
    moec_free(source);
    return 0;
}

static void clear(void)
{
    char *partial;
    assert_int_equal(moec_format(&partial, NULL, "%s.partial", out), MOEC_OK);
    tiny_remove(out);
    tiny_remove(partial);
    moec_free(partial);
}

/* One shard of two tensors, of which the second is made of `pieces` scattered ranges, and a shard of one large tensor. */
static moec_out *make(int pieces, uint64_t at[], unsigned char **want, size_t *want_len)
{
    moec_out *o;
    const int64_t first = 1000, large = 17 << 20, n = 4096;
    const int64_t second = n * pieces;
    assert_int_equal(moec_out_new(&o, NULL), MOEC_OK);
    assert_int_equal(moec_out_shard(o, "model-00001-of-00002.safetensors", NULL, NULL), MOEC_OK);
    assert_int_equal(moec_out_tensor(o, "a", MOEC_U8, 1, &first, NULL), MOEC_OK);
    assert_int_equal(moec_out_bytes(o, fd, 7, 600, NULL), MOEC_OK);
    assert_int_equal(moec_out_bytes(o, fd, 607, 400, NULL), MOEC_OK);
    assert_int_equal(moec_out_tensor(o, "b", MOEC_U8, 1, &second, NULL), MOEC_OK);
    *want_len = (size_t)(first + second);
    assert_int_equal(moec_alloc((void **)want, *want_len, 1, NULL), MOEC_OK);
    memcpy(*want, source + 7, 1000);
    for (int i = 0; i < pieces; i++) {
        at[i] = noise() % (SOURCE_BYTES - (uint64_t)n);
        assert_int_equal(moec_out_bytes(o, fd, at[i], (uint64_t)n, NULL), MOEC_OK);
        memcpy(*want + first + i * n, source + at[i], (size_t)n);
    }
    assert_int_equal(moec_out_shard(o, "model-00002-of-00002.safetensors", "{\"format\":\"pt\",\"x\":\"y\"}", NULL), MOEC_OK);
    assert_int_equal(moec_out_tensor(o, "c", MOEC_U8, 1, &large, NULL), MOEC_OK);
    assert_int_equal(moec_out_bytes(o, fd, 12345, (uint64_t)large, NULL), MOEC_OK);
    assert_int_equal(moec_out_text(o, "config.json", "{}\n", 3, NULL), MOEC_OK);
    assert_int_equal(moec_out_close(o, NULL), MOEC_OK);
    return o;
}

static moec_writer_options options(void)
{
    return (moec_writer_options){.dir = out, .source = source_dir, .identity = "test", .resume = true};
}

static void run(moec_out *o, const moec_writer_options *opt)
{
    moec_writer *w;
    moec_err err = {MOEC_OK, ""};
    if (moec_writer_open(&w, o, opt, &err) != MOEC_OK || moec_writer_run(w, &err) != MOEC_OK ||
        moec_writer_publish(w, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    moec_writer_close(w);
}

static void check_data(const char *name, const unsigned char *want, size_t n)
{
    char *path = tiny_path(out, name), *bytes;
    size_t len;
    moec_st_index ix;
    assert_int_equal(moec_file_read(&bytes, &len, path, 1 << 30, NULL), MOEC_OK);
    assert_int_equal(moec_st_parse(&ix, bytes, len, len, name, NULL), MOEC_OK);
    assert_int_equal(len - ix.data_at, n);
    assert_memory_equal(bytes + ix.data_at, want, n);
    moec_st_index_release(&ix);
    moec_free(bytes);
    moec_free(path);
}

static void test_bytes(void **state)
{
    (void)state;
    static const int threads[] = {1, 2, 3};
    for (size_t t = 0; t < MOEC_COUNT(threads); t++) {
        uint64_t at[300];
        unsigned char *want;
        size_t len;
        moec_par_set_threads(threads[t]);
        clear();
        moec_out *o = make(300, at, &want, &len);
        moec_writer_options opt = options();
        run(o, &opt);
        check_data("model-00001-of-00002.safetensors", want, len);
        check_data("model-00002-of-00002.safetensors", source + 12345, 17 << 20);
        moec_free(want);
        moec_out_free(o);
    }
    moec_par_set_threads(0);
}

/* Hashes are those of the files, whatever was hashed on the way. */
static void test_hashes(void **state)
{
    (void)state;
    uint64_t at[8];
    unsigned char *want;
    size_t len;
    moec_writer *w;
    moec_writer_options opt = options();
    clear();
    moec_out *o = make(8, at, &want, &len);
    assert_int_equal(moec_writer_open(&w, o, &opt, NULL), MOEC_OK);
    assert_int_equal(moec_writer_run(w, NULL), MOEC_OK);
    assert_int_equal(moec_writer_files(w), 3);
    for (size_t i = 0; i < 3; i++) {
        uint64_t bytes, there;
        moec_digest hash, again;
        char *path = tiny_path(moec_writer_dir(w), moec_writer_file(&bytes, &hash, w, i));
        assert_int_equal(moec_file_digest(&again, &there, path, NULL), MOEC_OK);
        assert_string_equal(hash.hex, again.hex);
        assert_int_equal(bytes, there);
        moec_free(path);
    }
    assert_int_equal(moec_writer_add(w, "note", "abc", 3, NULL), MOEC_OK);
    assert_int_equal(moec_writer_files(w), 3);
    moec_writer_close(w);
    moec_free(want);
    moec_out_free(o);
}

static void test_lists(void **state)
{
    (void)state;
    moec_out *o;
    moec_writer *w;
    moec_writer_options opt = options();
    const int64_t dim = 100, huge[3] = {INT64_MAX, INT64_MAX, 2};
    assert_int_equal(moec_out_new(&o, NULL), MOEC_OK);
    assert_int_equal(moec_out_tensor(o, "a", MOEC_U8, 1, &dim, NULL), MOEC_EINVAL);
    assert_int_equal(moec_out_bytes(o, fd, 0, 1, NULL), MOEC_EINVAL);
    assert_int_equal(moec_out_shard(o, "s", NULL, NULL), MOEC_OK);
    assert_int_equal(moec_out_tensor(o, "h", MOEC_F32, 3, huge, NULL), MOEC_EINVAL);
    assert_int_equal(moec_out_tensor(o, "a", MOEC_U8, 1, &dim, NULL), MOEC_OK);
    assert_int_equal(moec_out_bytes(o, fd, 0, 101, NULL), MOEC_EINVAL);
    assert_int_equal(moec_out_bytes(o, fd, 0, 99, NULL), MOEC_OK);
    assert_int_equal(moec_out_tensor(o, "b", MOEC_U8, 1, &dim, NULL), MOEC_EINVAL);
    assert_int_equal(moec_out_close(o, NULL), MOEC_EINVAL);
    assert_int_equal(moec_writer_open(&w, o, &opt, NULL), MOEC_EINVAL);
    assert_int_equal(moec_out_bytes(o, fd, 0, 1, NULL), MOEC_OK);
    assert_int_equal(moec_out_text(o, "../x", "", 0, NULL), MOEC_EINVAL);
    assert_int_equal(moec_out_close(o, NULL), MOEC_OK);
    assert_int_equal(moec_out_shard(o, "t", NULL, NULL), MOEC_EINVAL);
    moec_out_free(o);
}

static void refuse(const moec_writer_options *opt, moec_status code, const char *says)
{
    uint64_t at[1];
    unsigned char *want;
    size_t len;
    moec_writer *w;
    moec_err err = {MOEC_OK, ""};
    moec_out *o = make(1, at, &want, &len);
    moec_status st = moec_writer_open(&w, o, opt, &err);
    if (st != code || !strstr(err.text, says))
        fail_msg("code %d, \"%s\"; expected %d and \"%s\"", (int)st, err.text, (int)code, says);
    assert_null(w);
    moec_free(want);
    moec_out_free(o);
}

static void test_places(void **state)
{
    (void)state;
    char *inside = tiny_path(source_dir, "sub/out"), *dotted = tiny_path(folder, "no/../out"), *link = tiny_path(folder, "link");
    char *file = tiny_path(folder, "file"), *mine = tiny_path(folder, "mine"), *partial;
    moec_writer_options opt = options();
    clear();
    opt.dir = source_dir;
    refuse(&opt, MOEC_EINVAL, "is the source");
    opt.overwrite = true;
    refuse(&opt, MOEC_EINVAL, "is the source");
    opt.dir = inside;
    refuse(&opt, MOEC_EINVAL, "inside the source");
    opt.dir = folder;
    refuse(&opt, MOEC_EINVAL, "holds the source");
    opt.dir = dotted;
    refuse(&opt, MOEC_EINVAL, "'..'");
    opt.dir = "";
    refuse(&opt, MOEC_EINVAL, "empty");
    opt.dir = "/";
    refuse(&opt, MOEC_EINVAL, "not a name");
    assert_int_equal(symlink(source_dir, link), 0);
    opt.dir = link;
    refuse(&opt, MOEC_EINVAL, "is the source");
    assert_int_equal(moec_file_write(file, "x", 1, NULL), MOEC_OK);
    opt.dir = file;
    refuse(&opt, MOEC_EEXIST, "not a folder");
    opt.dir = mine; /* somebody's folder, and no model: not even --overwrite takes it */
    assert_int_equal(moec_dir_make(mine, NULL), MOEC_OK);
    char *thesis = tiny_path(mine, "thesis.tex");
    assert_int_equal(moec_file_write(thesis, "x", 1, NULL), MOEC_OK);
    refuse(&opt, MOEC_EEXIST, "not a model folder");
    opt = options();
    assert_int_equal(moec_dir_make(out, NULL), MOEC_OK);
    refuse(&opt, MOEC_EEXIST, "--overwrite");
    clear();
    assert_int_equal(moec_format(&partial, NULL, "%s.partial", out), MOEC_OK);
    assert_int_equal(rename(mine, partial), 0);
    refuse(&opt, MOEC_EEXIST, "not made by moecompress");
    moec_free(thesis);
    thesis = tiny_path(partial, "thesis.tex");
    assert_true(moec_path_exists(thesis));
    char *all[] = {inside, dotted, link, file, mine, partial, thesis};
    clear();
    for (size_t i = 0; i < MOEC_COUNT(all); i++)
        moec_free(all[i]);
}

static void test_overwrite(void **state)
{
    (void)state;
    uint64_t at[4];
    unsigned char *want;
    size_t len;
    char *stale = tiny_path(out, "stale");
    moec_writer_options opt = options();
    clear();
    moec_out *o = make(4, at, &want, &len);
    run(o, &opt);
    assert_int_equal(moec_file_write(stale, "x", 1, NULL), MOEC_OK);
    opt.overwrite = true;
    run(o, &opt);
    assert_false(moec_path_exists(stale));
    check_data("model-00001-of-00002.safetensors", want, len);
    char **names;
    size_t n;
    assert_int_equal(moec_dir_list(&names, &n, folder, NULL), MOEC_OK);
    for (size_t i = 0; i < n; i++)
        assert_null(strstr(names[i], "out."));
    moec_names_free(names, n);
    moec_free(stale);
    moec_free(want);
    moec_out_free(o);
}

static void test_lock(void **state)
{
    (void)state;
    uint64_t at[1];
    unsigned char *want;
    size_t len;
    moec_writer *w, *second;
    moec_err err = {MOEC_OK, ""};
    moec_writer_options opt = options();
    clear();
    moec_out *o = make(1, at, &want, &len);
    assert_int_equal(moec_writer_open(&w, o, &opt, NULL), MOEC_OK);
    assert_int_equal(moec_writer_open(&second, o, &opt, &err), MOEC_EEXIST);
    assert_non_null(strstr(err.text, "another run"));
    moec_writer_close(w);
    assert_int_equal(moec_writer_open(&w, o, &opt, NULL), MOEC_OK);
    moec_writer_close(w);
    moec_free(want);
    moec_out_free(o);
}

/* --- a run that dies -------------------------------------------------------------------------------------------------- */

typedef struct watch {
    uint64_t seen[2], stop_after;
    size_t calls;
    bool fail;
} watch;

static moec_status look(void *ctx, size_t s, const unsigned char *file, uint64_t lo, uint64_t hi, moec_err *err)
{
    watch *v = ctx;
    (void)file;
    v->seen[s] += hi - lo;
    if (++v->calls > v->stop_after)
        return v->fail ? moec_fail(err, MOEC_EIO, "bytes differ") : moec_fail(err, MOEC_EINTR, "interrupted");
    return MOEC_OK;
}

static void test_resume(void **state)
{
    (void)state;
    uint64_t at[4];
    unsigned char *want;
    size_t len;
    char *first, *second;
    struct stat before, after;
    moec_writer_options opt = options();
    clear();
    moec_out *o = make(4, at, &want, &len);
    pid_t child = fork();
    if (child == 0) { /* dies without a word in the middle of the second shard */
        moec_par_set_threads(1);
        watch v = {.stop_after = 2};
        opt.check = look;
        opt.ctx = &v;
        moec_writer *w;
        if (moec_writer_open(&w, o, &opt, NULL) == MOEC_OK && moec_writer_run(w, NULL) != MOEC_OK)
            kill(getpid(), SIGKILL);
        _exit(1);
    }
    int status;
    waitpid(child, &status, 0);
    assert_true(WIFSIGNALED(status));
    assert_int_equal(moec_format(&first, NULL, "%s.partial/model-00001-of-00002.safetensors", out), MOEC_OK);
    assert_int_equal(moec_format(&second, NULL, "%s.partial/model-00002-of-00002.safetensors", out), MOEC_OK);
    assert_false(moec_path_exists(second));
    assert_int_equal(stat(first, &before), 0);
    run(o, &opt);
    char *path = tiny_path(out, "model-00001-of-00002.safetensors");
    assert_int_equal(stat(path, &after), 0);
    assert_int_equal(before.st_ino, after.st_ino); /* taken up, not written again */
    moec_free(path);
    check_data("model-00001-of-00002.safetensors", want, len);
    check_data("model-00002-of-00002.safetensors", source + 12345, 17 << 20);
    moec_free(first);
    moec_free(second);
    moec_free(want);
    moec_out_free(o);
}

/* A complete shard of the same size with a wrong byte: the check finds it and the next run starts afresh. */
static void test_check(void **state)
{
    (void)state;
    uint64_t at[4];
    unsigned char *want;
    size_t len;
    moec_writer *w;
    moec_err err = {MOEC_OK, ""};
    watch v = {.stop_after = UINT64_MAX};
    moec_writer_options opt = options();
    opt.check = look;
    opt.ctx = &v;
    clear();
    moec_par_set_threads(1);
    moec_out *o = make(4, at, &want, &len);
    run(o, &opt);
    assert_int_equal(v.seen[0], moec_out_size(o, 0)); /* every byte once */
    assert_int_equal(v.seen[1], moec_out_size(o, 1));
    clear();
    v = (watch){.stop_after = 1, .fail = true};
    assert_int_equal(moec_writer_open(&w, o, &opt, &err), MOEC_OK);
    assert_int_equal(moec_writer_run(w, &err), MOEC_EIO);
    assert_false(moec_path_exists(moec_writer_dir(w)));
    moec_writer_close(w);
    assert_false(moec_path_exists(out));
    moec_par_set_threads(0);
    moec_free(want);
    moec_out_free(o);
}

static void test_other_identity(void **state)
{
    (void)state;
    uint64_t at[4];
    unsigned char *want;
    size_t len;
    char *stray;
    moec_writer *w;
    moec_writer_options opt = options();
    clear();
    moec_out *o = make(4, at, &want, &len);
    opt.identity = "another";
    assert_int_equal(moec_writer_open(&w, o, &opt, NULL), MOEC_OK);
    assert_int_equal(moec_writer_run(w, NULL), MOEC_OK);
    moec_writer_close(w); /* complete, but never published, and of other content */
    assert_int_equal(moec_format(&stray, NULL, "%s.partial/model-00001-of-00002.safetensors", out), MOEC_OK);
    assert_int_equal(moec_file_write(stray, want, len, NULL), MOEC_OK);
    opt.identity = "test";
    run(o, &opt);
    check_data("model-00001-of-00002.safetensors", want, len);
    moec_free(stray);
    moec_free(want);
    moec_out_free(o);
}

/* A file size limit stands for a full disk: the same path through the code, without needing one. */
static void test_full_disk(void **state)
{
    (void)state;
    uint64_t at[1];
    unsigned char *want;
    size_t len;
    moec_writer_options opt = options();
    clear();
    moec_out *o = make(1, at, &want, &len);
    pid_t child = fork();
    if (child == 0) {
        const struct rlimit limit = {4 << 20, 4 << 20};
        moec_writer *w;
        moec_err err = {MOEC_OK, ""};
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &limit);
        if (moec_writer_open(&w, o, &opt, &err) != MOEC_OK)
            _exit(2);
        moec_status st = moec_writer_run(w, &err);
        _exit(st == MOEC_ENOFIT && !moec_path_exists(out) ? 0 : 1);
    }
    int status;
    waitpid(child, &status, 0);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    run(o, &opt);
    check_data("model-00001-of-00002.safetensors", want, len);
    moec_free(want);
    moec_out_free(o);
}

static void test_copy_range(void **state)
{
    (void)state;
    char *path = tiny_path(folder, "copy");
    moec_err err = {MOEC_OK, ""};
    int to = open(path, O_RDWR | O_CREAT | O_TRUNC, 0666), both[2];
    unsigned char *back;
    assert_int_equal(moec_copy_range(to, 3, fd, 11, 1 << 20, "copy", &err), MOEC_OK);
    assert_int_equal(moec_alloc((void **)&back, 1 << 20, 1, NULL), MOEC_OK);
    assert_int_equal(pread(to, back, 1 << 20, 3), 1 << 20);
    assert_memory_equal(back, source + 11, 1 << 20);
    assert_int_equal(moec_copy_range(to, 0, fd, SOURCE_BYTES - 10, 100, "copy", &err), MOEC_EIO);
    assert_non_null(strstr(err.text, "ends early"));
    assert_int_equal(pipe(both), 0); /* neither way works on a pipe */
    assert_int_equal(moec_copy_range(both[1], 0, fd, 0, 1 << 20, "copy", NULL), MOEC_EIO);
    close(both[0]);
    close(both[1]);
    close(to);
    moec_free(back);
    moec_free(path);
}

static moec_status counting(void *to, void *ctx, uint64_t from, size_t n, moec_err *err)
{
    (void)err;
    assert_int_equal(from % 4, 0); /* whole values, though pieces of the file are cut anywhere */
    for (size_t i = 0; i < n; i += 4) {
        uint32_t v = (uint32_t)((from + i) / 4 * *(const uint32_t *)ctx);
        memcpy((char *)to + i, &v, 4);
    }
    return MOEC_OK;
}

/* Segments that are made: one value over and over, and bytes of a function, over more than one piece, at odd offsets. */
static void test_made(void **state)
{
    (void)state;
    enum { FILL = 3 << 20, MADE = 5 << 20, FROM = 12 };
    static const unsigned char value[2] = {0x1c, 0xc6};
    static uint32_t factor = 2654435761u;
    const int64_t odd = 5, fill = FILL / 2 + 1, made = MADE / 4 + 1;
    moec_out *o;
    moec_writer *w;
    moec_err err = {MOEC_OK, ""};
    const moec_writer_options opt = {.dir = out, .identity = "made"};
    clear();
    assert_int_equal(moec_out_new(&o, NULL), MOEC_OK);
    assert_int_equal(moec_out_shard(o, "model.safetensors", NULL, NULL), MOEC_OK);
    assert_int_equal(moec_out_tensor(o, "odd", MOEC_U8, 1, &odd, NULL), MOEC_OK);
    assert_int_equal(moec_out_bytes(o, fd, 0, 5, NULL), MOEC_OK);
    assert_int_equal(moec_out_tensor(o, "fill", MOEC_BF16, 1, &fill, NULL), MOEC_OK);
    assert_int_equal(moec_out_fill(o, value, 2, 3, NULL), MOEC_EINVAL);
    assert_int_equal(moec_out_fill(o, value, 0, 2, NULL), MOEC_EINVAL);
    assert_int_equal(moec_out_fill(o, value, 2, FILL + 2, NULL), MOEC_OK);
    assert_int_equal(moec_out_tensor(o, "made", MOEC_F32, 1, &made, NULL), MOEC_OK);
    assert_int_equal(moec_out_made(o, counting, &factor, FROM, MADE, NULL), MOEC_OK);
    assert_int_equal(moec_out_made(o, counting, &factor, 0, 4, NULL), MOEC_OK);
    assert_int_equal(moec_out_close(o, NULL), MOEC_OK);
    if (moec_writer_open(&w, o, &opt, &err) != MOEC_OK || moec_writer_run(w, &err) != MOEC_OK ||
        moec_writer_publish(w, &err) != MOEC_OK)
        fail_msg("%s", err.text);
    moec_writer_close(w);
    char *bytes, *path = tiny_path(out, "model.safetensors");
    size_t len, head;
    assert_int_equal(moec_file_read(&bytes, &len, path, 1 << 30, NULL), MOEC_OK);
    (void)moec_out_header(&head, o, 0);
    assert_int_equal(len, head + 5 + FILL + 2 + MADE + 4);
    const char *at = bytes + head;
    assert_memory_equal(at, source, 5);
    for (size_t i = 0; i < FILL + 2; i++)
        assert_true((unsigned char)at[5 + i] == value[i % 2]);
    at += 5 + FILL + 2;
    for (uint32_t i = 0; i < MADE / 4; i++) {
        uint32_t v = (i + FROM / 4) * factor;
        assert_true(memcmp(at + 4 * (size_t)i, &v, 4) == 0);
    }
    moec_free(bytes);
    moec_free(path);
    moec_out_free(o);
}

typedef struct stopping {
    uint64_t stop, made; /* fails from this byte on; bytes that were made */
    uint64_t least;      /* first byte that was asked for */
} stopping;

static moec_status made_until(void *to, void *ctx, uint64_t from, size_t n, moec_err *err)
{
    stopping *s = ctx;
    if (from >= s->stop)
        return moec_fail(err, MOEC_EINTR, "interrupted");
    for (size_t i = 0; i < n; i++)
        ((unsigned char *)to)[i] = (unsigned char)((from + i) * 7 >> 3);
    s->made += n;
    s->least = from < s->least ? from : s->least;
    return MOEC_OK;
}

enum { RAW = 5 << 20 };

/* One file in place of a folder, run until byte `stop` of its data. */
static moec_status one_file(stopping *s, const char *path, bool overwrite, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_out *o = NULL;
    moec_writer *w = NULL;
    const moec_writer_options opt = {.dir = path, .magic = "RAWF", .identity = "one", .overwrite = overwrite, .resume = true};
    *err = (moec_err){MOEC_OK, ""};
    s->made = 0;
    s->least = RAW;
    MOEC_TRY(moec_out_new(&o, err));
    MOEC_TRY(moec_out_raw(o, "one.raw", "RAWF", 4, RAW, err));
    MOEC_TRY(moec_out_made(o, made_until, s, 0, RAW, err));
    MOEC_TRY(moec_out_close(o, err));
    MOEC_TRY(moec_writer_open(&w, o, &opt, err));
    MOEC_TRY(moec_writer_run(w, err));
    MOEC_TRY(moec_writer_publish(w, err));
done:
    moec_writer_close(w);
    moec_out_free(o);
    return st;
}

/* What an interrupted run wrote of a file is not made again, unless it is damaged; the file goes to its name at the end. */
static void test_one_file(void **state)
{
    (void)state;
    clear();
    moec_err err;
    stopping s = {.stop = 3 << 20};
    char *path = tiny_path(folder, "one.raw"), *tmp = tiny_path(folder, "one.raw.partial/one.raw.tmp"), *partial = tiny_path(folder, "one.raw.partial");
    char *bytes;
    size_t len;
    moec_par_set_threads(1);
    for (int damaged = 0; damaged < 2; damaged++) {
        s.stop = 3 << 20;
        assert_int_equal(one_file(&s, path, true, &err), MOEC_EINTR);
        assert_true(moec_path_exists(tmp));
        if (damaged) {
            FILE *f = fopen(tmp, "r+b");
            assert_true(f && fseek(f, 1000, SEEK_SET) == 0 && fputc(77, f) == 77 && fclose(f) == 0);
        }
        s.stop = UINT64_MAX;
        if (one_file(&s, path, true, &err) != MOEC_OK)
            fail_msg("%s", err.text);
        if (damaged)
            assert_int_equal(s.least, 0);
        else
            assert_true(s.least > (2 << 20) - 16 && s.made < (3 << 20) + 4096);
        assert_false(moec_path_exists(partial));
        assert_int_equal(moec_file_read(&bytes, &len, path, 1 << 30, NULL), MOEC_OK);
        assert_int_equal(len, 4 + RAW);
        assert_memory_equal(bytes, "RAWF", 4);
        for (size_t i = 0; i < RAW; i++)
            if ((unsigned char)bytes[4 + i] != (unsigned char)(i * 7 >> 3))
                fail_msg("byte %zu", i);
        moec_free(bytes);
    }
    assert_int_equal(one_file(&s, path, false, &err), MOEC_EEXIST);
    assert_int_equal(moec_file_write(path, "precious", 8, NULL), MOEC_OK);
    assert_int_equal(one_file(&s, path, true, &err), MOEC_EEXIST);
    assert_non_null(strstr(err.text, "is not a RAWF file"));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkdir(path, 0777), 0);
    assert_int_equal(one_file(&s, path, true, &err), MOEC_EEXIST);
    assert_int_equal(rmdir(path), 0);
    moec_par_set_threads(0);
    moec_free(partial);
    moec_free(tmp);
    moec_free(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bytes),     cmocka_unit_test(test_hashes), cmocka_unit_test(test_lists),
        cmocka_unit_test(test_places),    cmocka_unit_test(test_overwrite), cmocka_unit_test(test_lock),
        cmocka_unit_test(test_resume),    cmocka_unit_test(test_check),  cmocka_unit_test(test_other_identity),
        cmocka_unit_test(test_full_disk), cmocka_unit_test(test_copy_range), cmocka_unit_test(test_made),
        cmocka_unit_test(test_one_file),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
