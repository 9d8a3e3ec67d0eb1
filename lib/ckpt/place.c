/* Takes OUT.partial for one run, and turns it into OUT at the end. */
#include "ckpt/place.h"

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/opt.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

/* Absolute path without links; parts at the end that do not exist yet are taken as they are written. */
static moec_status real_path(char **out, const char *path, moec_err *err)
{
    char *head, *found = NULL;
    *out = NULL;
    moec_status st = moec_copy(&head, path, strlen(path), err);
    if (st != MOEC_OK)
        return st;
    size_t cut = strlen(head);
    for (;;) {
        found = realpath(*head ? head : ".", NULL);
        if (found || errno != ENOENT || !*head)
            break;
        while (cut > 0 && head[cut - 1] == '/')
            cut--;
        while (cut > 0 && head[cut - 1] != '/')
            cut--;
        if (strncmp(path + cut, "..", 2) == 0 && (path[cut + 2] == '/' || path[cut + 2] == '\0')) {
            st = moec_fail(err, MOEC_EINVAL, "%s: '..' behind a folder that does not exist", path);
            goto done;
        }
        head[cut] = '\0';
    }
    if (!found)
        st = moec_fail_errno(err, errno, path);
    else
        st = moec_format(out, err, "%s%s%s", found, path[cut] && strcmp(found, "/") != 0 ? "/" : "", path + cut);
done:
    free(found); /* libc's own allocation */
    moec_free(head);
    return st;
}

static bool holds(const char *folder, const char *path)
{
    size_t n = strlen(folder);
    if (n > 0 && folder[n - 1] == '/') /* the root */
        n--;
    return strncmp(folder, path, n) == 0 && (path[n] == '/' || path[n] == '\0');
}

/* The source is never written to, and an output that is replaced must not take the source with it. */
static moec_status check_apart(const char *out, const char *source, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *a = NULL, *b = NULL;
    MOEC_TRY(real_path(&a, out, err));
    MOEC_TRY(real_path(&b, source, err));
    if (strcmp(a, b) == 0)
        st = moec_fail(err, MOEC_EINVAL, "%s: the output is the source; choose another folder", out);
    else if (holds(b, a))
        st = moec_fail(err, MOEC_EINVAL, "%s: the output lies inside the source %s; choose another folder", out, source);
    else if (holds(a, b))
        st = moec_fail(err, MOEC_EINVAL, "%s: the output holds the source %s; choose another folder", out, source);
done:
    moec_free(a);
    moec_free(b);
    return st;
}

static moec_status has_file(bool *out, const char *dir, const char *name, moec_err *err)
{
    char *path;
    moec_status st = moec_path_join(&path, dir, name, err);
    if (st == MOEC_OK)
        *out = moec_path_exists(path);
    moec_free(path);
    return st;
}

/* Replacing means deleting: only a folder that looks like a model goes, whatever was typed behind -o. */
static moec_status check_replaceable(const char *dir, moec_err *err)
{
    moec_status st = MOEC_OK;
    struct stat s;
    bool config = false, manifest = false;
    char **names = NULL;
    size_t n = 0;
    if (lstat(dir, &s) != 0)
        return moec_fail_errno(err, errno, dir);
    if (!S_ISDIR(s.st_mode))
        return moec_fail(err, MOEC_EEXIST, "%s: is there and is not a folder; it is not replaced", dir);
    MOEC_TRY(moec_dir_list(&names, &n, dir, err));
    MOEC_TRY(has_file(&config, dir, "config.json", err));
    MOEC_TRY(has_file(&manifest, dir, MOEC_MANIFEST, err));
    if (n > 0 && !config && !manifest)
        st = moec_fail(err, MOEC_EEXIST, "%s: is there and is not a model folder; it is not replaced", dir);
done:
    moec_names_free(names, n);
    return st;
}

/* Of files only an empty one or one of the same container. */
static moec_status check_file(const moec_place_out *p, moec_err *err)
{
    struct stat s;
    char front[16];
    if (lstat(p->dir, &s) != 0)
        return moec_fail_errno(err, errno, p->dir);
    if (!S_ISREG(s.st_mode))
        return moec_fail(err, MOEC_EEXIST, "%s: is there and is not a regular file; it is not replaced", p->dir);
    FILE *f = fopen(p->dir, "rb");
    if (!f)
        return moec_fail_errno(err, errno, p->dir);
    const size_t n = fread(front, 1, sizeof front, f), want = strlen(p->magic);
    fclose(f);
    if (n > 0 && (n < want || memcmp(front, p->magic, want) != 0))
        return moec_fail(err, MOEC_EEXIST, "%s: is there and is not a %s file; it is not replaced", p->dir, p->magic);
    return MOEC_OK;
}

static moec_status check_out(const moec_place_out *p, moec_err *err)
{
    if (!moec_path_exists(p->dir))
        return MOEC_OK;
    if (!p->overwrite)
        return moec_fail(err, MOEC_EEXIST, "%s: is already there; --overwrite replaces it", p->dir);
    return p->magic ? check_file(p, err) : check_replaceable(p->dir, err);
}

/* The lock is on the folder itself, so that no file is left behind. The folder may have been renamed or removed by the
 * run that held the lock before; then the path no longer leads to what was locked. */
static moec_status take_lock(moec_place_out *p, moec_err *err)
{
    struct stat mine, there;
    p->lock = open(p->partial, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (p->lock < 0)
        return errno == ENOTDIR || errno == ELOOP
                   ? moec_fail(err, MOEC_EEXIST, "%s: is there and is not a folder", p->partial)
                   : moec_fail_errno(err, errno, p->partial);
    if (flock(p->lock, LOCK_EX | LOCK_NB) != 0) {
        if (errno == EWOULDBLOCK)
            return moec_fail(err, MOEC_EEXIST, "%s: another run is writing this output", p->partial);
        moec_note("%s: this file system has no locks; do not start a second run on it", p->partial);
    }
    if (fstat(p->lock, &mine) != 0 || lstat(p->partial, &there) != 0 || mine.st_ino != there.st_ino ||
        mine.st_dev != there.st_dev)
        return moec_fail(err, MOEC_EEXIST, "%s: another run has just finished this output", p->partial);
    return MOEC_OK;
}

/* Is what an earlier run left the beginning of this very output? `ours`: it is some output of this program. */
static moec_status read_mark(bool *same, bool *ours, const moec_place_out *p, const char *mark, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *path = NULL, *text = NULL, **names = NULL;
    size_t len = 0, n = 0;
    MOEC_TRY(moec_path_join(&path, p->partial, MOEC_PARTIAL_MARK, err));
    *same = *ours = false;
    if (moec_path_exists(path)) {
        MOEC_TRY(moec_file_read(&text, &len, path, 4096, err));
        *ours = true;
        *same = strcmp(text, mark) == 0;
        goto done;
    }
    /* A run that died after taking the mark off, just before the rename, left a manifest; one that died right after
     * making the folder left nothing, or the mark under its temporary name. */
    MOEC_TRY(has_file(ours, p->partial, MOEC_MANIFEST, err));
    MOEC_TRY(moec_dir_list(&names, &n, p->partial, err));
    *ours = *ours || n == 0 || strncmp(names[0], MOEC_PARTIAL_MARK, strlen(MOEC_PARTIAL_MARK)) == 0;
done:
    moec_names_free(names, n);
    moec_free(text);
    moec_free(path);
    return st;
}

/* Removes what cannot be taken up, but not the mark: whoever dies here must leave a folder that is known as ours.
 * *kept is the size of what can be taken up. */
static moec_status clear_rest(uint64_t *kept, const moec_place_out *p, moec_keep_fn *keep, void *ctx, moec_err *err)
{
    moec_status st = MOEC_OK;
    char **names = NULL, *path = NULL;
    size_t n = 0;
    *kept = 0;
    MOEC_TRY(moec_dir_list(&names, &n, p->partial, err));
    for (size_t i = 0; i < n; i++) {
        struct stat s;
        if (strcmp(names[i], MOEC_PARTIAL_MARK) == 0)
            continue;
        MOEC_TRY(moec_path_join(&path, p->partial, names[i], err));
        if (lstat(path, &s) == 0 && S_ISREG(s.st_mode) && keep && keep(ctx, names[i], (uint64_t)s.st_size))
            *kept += (uint64_t)(s.st_blocks * 512 < s.st_size ? s.st_blocks * 512 : s.st_size);
        else
            MOEC_TRY(moec_dir_remove(path, err));
        moec_free(path);
        path = NULL;
    }
done:
    moec_free(path);
    moec_names_free(names, n);
    return st;
}

static moec_status check_disk(const moec_place_out *p, uint64_t need, moec_err *err)
{
    uint64_t there = 0;
    char a[32], b[32];
    moec_status st = moec_disk_free(&there, p->partial, err);
    if (st == MOEC_OK && there < need)
        st = moec_fail(err, MOEC_ENOFIT, "%s: the disk has %s (%llu bytes) free, %s (%llu bytes) are needed", p->dir,
                       moec_size_text(b, sizeof b, there), (unsigned long long)there,
                       moec_size_text(a, sizeof a, need), (unsigned long long)need);
    return st;
}

static moec_status write_mark(const moec_place_out *p, const char *mark, moec_err *err)
{
    char *path;
    moec_status st = moec_path_join(&path, p->partial, MOEC_PARTIAL_MARK, err);
    if (st == MOEC_OK)
        st = moec_file_write(path, mark, strlen(mark), err);
    moec_free(path);
    return st;
}

static moec_status take_old(uint64_t *kept, moec_place_out *p, bool resume, const char *mark, moec_keep_fn *keep,
                            void *ctx, moec_err *err)
{
    moec_status st = MOEC_OK;
    bool same = false, ours = false;
    MOEC_TRY(take_lock(p, err));
    MOEC_TRY(read_mark(&same, &ours, p, mark, err));
    if (!ours) {
        st = moec_fail(err, MOEC_EEXIST, "%s: is there and was not made by moecompress; move it away", p->partial);
        goto done;
    }
    p->fresh = !(same && resume);
    if (p->fresh)
        moec_say("%s holds %s unfinished output; it is discarded", p->partial, same ? "an" : "another");
    MOEC_TRY(clear_rest(kept, p, p->fresh ? NULL : keep, ctx, err));
done:
    return st;
}

/* May OUT be written? Touches nothing. */
static moec_status look(moec_place_out *p, const moec_writer_options *opt, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t n = strlen(opt->dir);
    *p = (moec_place_out){.lock = -1, .magic = opt->magic, .overwrite = opt->overwrite, .fresh = true};
    while (n > 1 && opt->dir[n - 1] == '/')
        n--;
    if (n == 0)
        return moec_fail(err, MOEC_EINVAL, "the output has an empty name");
    MOEC_TRY(moec_copy(&p->dir, opt->dir, n, err));
    if (!moec_path_is_plain(moec_path_base(p->dir))) {
        st = moec_fail(err, MOEC_EINVAL, "%s: not a name for an output folder", p->dir);
        goto done;
    }
    MOEC_TRY(moec_format(&p->partial, err, "%s.partial", p->dir));
    if (opt->source) {
        MOEC_TRY(check_apart(p->dir, opt->source, err));
        MOEC_TRY(check_apart(p->partial, opt->source, err));
    }
    MOEC_TRY(check_out(p, err));
done:
    return st;
}

moec_status moec_place_check(const moec_writer_options *opt, moec_err *err)
{
    moec_place_out p;
    moec_status st = look(&p, opt, err);
    moec_place_release(&p);
    return st;
}

moec_status moec_place_take(moec_place_out *p, const moec_writer_options *opt, const char *mark, uint64_t need_bytes,
                            moec_keep_fn *keep, void *ctx, moec_err *err)
{
    moec_status st = MOEC_OK;
    uint64_t kept = 0;
    MOEC_TRY(look(p, opt, err));
    bool old = moec_path_exists(p->partial);
    if (old)
        MOEC_TRY(take_old(&kept, p, opt->resume, mark, keep, ctx, err));
    MOEC_TRY(check_disk(p, need_bytes > kept ? need_bytes - kept : 0, err));
    if (!old) {
        MOEC_TRY(moec_dir_make(p->partial, err));
        MOEC_TRY(take_lock(p, err));
    }
    MOEC_TRY(write_mark(p, mark, err));
done:
    return st;
}

/* OUT is there and shall be replaced: both names change in one step where the kernel can do that. `aside` is a free name for
 * where it cannot; *old is where the old output ends up. */
static moec_status exchange(const char **old, const moec_place_out *p, const char *aside, moec_err *err)
{
    *old = p->partial;
    if (renameat2(AT_FDCWD, p->partial, AT_FDCWD, p->dir, RENAME_EXCHANGE) == 0)
        return MOEC_OK;
    *old = aside;
    if (rename(p->dir, aside) != 0)
        return moec_fail_errno(err, errno, p->dir);
    if (rename(p->partial, p->dir) == 0)
        return MOEC_OK;
    moec_status st = moec_fail_errno(err, errno, p->dir);
    if (rename(aside, p->dir) != 0)
        moec_warn("%s: the output that was to be replaced is now at %s", p->dir, aside);
    return st;
}

static moec_status rename_new(const moec_place_out *p, moec_err *err)
{
    if (renameat2(AT_FDCWD, p->partial, AT_FDCWD, p->dir, RENAME_NOREPLACE) == 0)
        return MOEC_OK;
    if (errno == EINVAL || errno == ENOSYS) /* a file system without it */
        if (!moec_path_exists(p->dir) && rename(p->partial, p->dir) == 0)
            return MOEC_OK;
    if (moec_path_exists(p->dir))
        return moec_fail(err, MOEC_EEXIST, "%s: appeared while its content was written; that is in %s", p->dir,
                         p->partial);
    return moec_fail_errno(err, errno, p->dir);
}

static moec_status publish_file(moec_place_out *p, const char *file, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_err why = {MOEC_OK, ""};
    char *path = NULL, *parent = NULL;
    MOEC_TRY(moec_path_join(&path, p->partial, file, err));
    MOEC_TRY(moec_copy(&parent, p->dir, (size_t)(moec_path_base(p->dir) - p->dir), err));
    MOEC_TRY(check_out(p, err));
    int failed = renameat2(AT_FDCWD, path, AT_FDCWD, p->dir, p->overwrite ? 0 : RENAME_NOREPLACE);
    if (failed != 0 && (errno == EINVAL || errno == ENOSYS)) /* a file system without it; check_out has looked just now */
        failed = rename(path, p->dir);
    if (failed != 0) {
        st = moec_fail_errno(err, errno, p->dir);
        goto done;
    }
    MOEC_TRY(moec_dir_sync(parent, err));
    if (moec_dir_remove(p->partial, &why) != MOEC_OK)
        moec_warn("%s: could not be removed: %s", p->partial, why.text);
done:
    moec_free(parent);
    moec_free(path);
    return st;
}

moec_status moec_place_publish(moec_place_out *p, const char *file, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *mark = NULL, *aside = NULL, *parent = NULL;
    const char *old = NULL;
    if (file)
        return publish_file(p, file, err);
    /* nothing that can fail for want of memory may stand between the new name and the report of success */
    MOEC_TRY(moec_path_join(&mark, p->partial, MOEC_PARTIAL_MARK, err));
    MOEC_TRY(moec_format(&aside, err, "%s.old-%ld", p->dir, (long)getpid()));
    MOEC_TRY(moec_copy(&parent, p->dir, (size_t)(moec_path_base(p->dir) - p->dir), err));
    MOEC_TRY(check_out(p, err));
    if (unlink(mark) != 0 && errno != ENOENT) {
        st = moec_fail_errno(err, errno, mark);
        goto done;
    }
    MOEC_TRY(moec_dir_sync(p->partial, err));
    if (moec_path_exists(p->dir))
        MOEC_TRY(exchange(&old, p, aside, err));
    else
        MOEC_TRY(rename_new(p, err));
    MOEC_TRY(moec_dir_sync(parent, err));
    moec_err why = {MOEC_OK, ""};
    if (old && moec_dir_remove(old, &why) != MOEC_OK)
        moec_warn("the replaced output could not be removed: %s", why.text);
done:
    moec_free(parent);
    moec_free(aside);
    moec_free(mark);
    return st;
}

void moec_place_release(moec_place_out *p)
{
    if (p->lock >= 0)
        close(p->lock); /* and the lock with it */
    moec_free(p->dir);
    moec_free(p->partial);
    *p = (moec_place_out){.lock = -1};
}
