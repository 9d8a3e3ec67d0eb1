/* Checkpoints: carry.N (hidden states and what moec_carry holds), stats.N.h5, and state.json that points at them. */
#include "calib/state.h"

#include "base/file.h"
#include "base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

static moec_status read_state(moec_checkpoint *c, const char *path, moec_err *err)
{
    moec_json *v;
    int64_t done, turn;
    bool on_disk;
    moec_status st = moec_json_read(&v, path, 1 << 16, err);
    if (st != MOEC_OK)
        return st;
    const char *id = moec_json_string(moec_json_get(v, "id"));
    c->same = id && strcmp(id, c->id) == 0;
    c->other = !c->same;
    if (c->other) {
        moec_say("%s: is of another model, text or options; it is not continued", c->dir);
    } else if (moec_json_int(moec_json_get(v, "layers_done"), &done) && moec_json_int(moec_json_get(v, "turn"), &turn) &&
               moec_json_bool(moec_json_get(v, "states_on_disk"), &on_disk) && done > 0 && (turn == 0 || turn == 1)) {
        c->layers_done = done;
        c->turn = (int)turn;
        c->on_disk = on_disk;
    }
    moec_json_free(v);
    return MOEC_OK;
}

static moec_status write_state(const moec_checkpoint *c, int64_t layers_done, int turn, bool on_disk, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *path = NULL, *text = NULL;
    MOEC_TRY(moec_path_join(&path, c->dir, "state.json", err));
    MOEC_TRY(moec_format(&text, err, "{\"id\": \"%s\", \"layers_done\": %lld, \"turn\": %d, \"states_on_disk\": %s}\n", c->id,
                         (long long)layers_done, turn, on_disk ? "true" : "false"));
    MOEC_TRY(moec_file_write(path, text, strlen(text), err));
done:
    moec_free(path);
    moec_free(text);
    return st;
}

/* Two runs in one folder would overwrite each other's hidden states. The lock ends with the process, however it ends. */
static moec_status lock_folder(moec_checkpoint *c, moec_err *err)
{
    c->lock = open(c->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (c->lock < 0)
        return moec_fail_errno(err, errno, c->dir);
    if (flock(c->lock, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) /* other failures: no locks on that file system */
        return MOEC_OK;
    close(c->lock);
    c->lock = -1;
    return moec_fail(err, MOEC_EEXIST, "%s: another run is at work there", c->dir);
}

moec_status moec_checkpoint_open(moec_checkpoint *out, const char *path, const char *id, bool resume, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *state = NULL;
    memset(out, 0, sizeof *out);
    out->lock = -1;
    snprintf(out->id, sizeof out->id, "%s", id);
    MOEC_TRY(moec_format(&out->dir, err, "%s.partial", path));
    MOEC_TRY(moec_path_join(&state, out->dir, "state.json", err));
    MOEC_TRY(moec_dir_make(out->dir, err));
    MOEC_TRY(lock_folder(out, err));
    if (resume && moec_path_exists(state)) {
        moec_err why = {MOEC_OK, ""};
        if (read_state(out, state, &why) != MOEC_OK) /* damaged: the work is lost, the result is not */
            moec_warn("%s; starting anew", why.text);
    }
done:
    moec_free(state);
    return st;
}

moec_status moec_checkpoint_restart(moec_checkpoint *c, moec_err *err)
{
    c->layers_done = 0;
    return write_state(c, 0, c->turn, false, err);
}

moec_status moec_checkpoint_clear(moec_checkpoint *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    char **name = NULL, *path = NULL;
    size_t n = 0;
    /* First of all nothing may point at files that are about to go; and the folder itself stays, it is locked. */
    MOEC_TRY(moec_checkpoint_restart(c, err));
    MOEC_TRY(moec_dir_list(&name, &n, c->dir, err));
    for (size_t i = 0; i < n; i++) {
        if (strcmp(name[i], "state.json") == 0)
            continue;
        MOEC_TRY(moec_path_join(&path, c->dir, name[i], err));
        MOEC_TRY(moec_dir_remove(path, err));
        moec_free(path);
        path = NULL;
    }
done:
    moec_free(path);
    moec_names_free(name, n);
    return st;
}

void moec_checkpoint_release(moec_checkpoint *c)
{
    if (c->lock >= 0) {
        rmdir(c->dir); /* refused unless empty */
        close(c->lock);
    }
    moec_free(c->dir);
    c->dir = NULL;
    c->lock = -1;
}

moec_status moec_checkpoint_remove(moec_checkpoint *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *state = NULL;
    MOEC_TRY(moec_path_join(&state, c->dir, "state.json", err));
    (void)unlink(state); /* first: what is left by a kill in between must not count as a run's work */
    MOEC_TRY(moec_dir_remove(c->dir, err));
done:
    moec_free(state);
    return st;
}

/* The arrays of a carry, in file order. */
typedef struct part {
    void *at;
    size_t bytes;
} part;

static int list_parts(part p[3], const moec_carry *c)
{
    size_t ids = (size_t)c->n_tokens * (size_t)c->slots * sizeof(int32_t);
    p[0] = (part){c->prev, ids};
    p[1] = (part){c->guess, ids};
    p[2] = (part){c->state, (size_t)(c->layers + 1) * (size_t)c->n_samples * (size_t)c->hidden * sizeof(float)};
    return 3;
}

static moec_status write_carry(const char *path, const moec_carry *carry, const moec_hidden *hidden, moec_err *err)
{
    moec_status st = MOEC_OK;
    part p[3];
    int n = list_parts(p, carry);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0)
        return moec_fail_errno(err, errno, path);
    for (int i = 0; i < n; i++)
        MOEC_TRY(moec_write_all(fd, p[i].at, p[i].bytes, path, err));
    MOEC_TRY(moec_hidden_save(hidden, fd, path, err));
    if (fsync(fd) != 0)
        st = moec_fail_errno(err, errno, path);
done:
    close(fd);
    return st;
}

/* hidden: NULL when its states are elsewhere. */
static moec_status read_carry(const char *path, moec_carry *carry, moec_hidden *hidden, moec_err *err)
{
    moec_status st = MOEC_OK;
    part p[3];
    int n = list_parts(p, carry);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return moec_fail_errno(err, errno, path);
    for (int i = 0; i < n; i++)
        MOEC_TRY(moec_read_all(fd, p[i].at, p[i].bytes, path, err));
    if (hidden)
        MOEC_TRY(moec_hidden_load(hidden, fd, path, err));
done:
    close(fd);
    return st;
}

/* Hidden states that an on-disk run left in a file of their own, for a run that keeps them in memory. */
static moec_status load_file(const moec_checkpoint *c, moec_hidden *hidden, moec_err *err)
{
    char *path;
    moec_status st = moec_hidden_path(&path, c->dir, moec_hidden_side(hidden), err);
    if (st != MOEC_OK)
        return st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    st = fd < 0 ? moec_fail_errno(err, errno, path) : moec_hidden_load(hidden, fd, path, err);
    if (fd >= 0)
        close(fd);
    moec_free(path);
    return st;
}

moec_status moec_checkpoint_load(const moec_checkpoint *c, moec_stats **stats, moec_carry *carry, moec_hidden *hidden,
                                 moec_err *err)
{
    moec_status st = MOEC_OK;
    char *path = NULL, *file = NULL;
    /* On disk the hidden states of a checkpoint lie in the file whose number is the layers' parity, see
     * moec_hidden_turn: the embeddings went to 1, layer 0's output to 0, and so on. */
    moec_hidden_set_side(hidden, (int)((c->layers_done + 1) % 2));
    MOEC_TRY(moec_format(&path, err, "%s/carry.%d", c->dir, c->turn));
    MOEC_TRY(moec_format(&file, err, "%s/stats.%d.h5", c->dir, c->turn));
    MOEC_TRY(moec_stats_load(stats, file, err));
    MOEC_TRY(read_carry(path, carry, c->on_disk ? NULL : hidden, err));
    if (c->on_disk)
        MOEC_TRY(moec_hidden_on_disk(hidden) ? moec_hidden_resume(hidden, err) : load_file(c, hidden, err));
done:
    moec_free(path);
    moec_free(file);
    return st;
}

moec_status moec_checkpoint_save(moec_checkpoint *c, int64_t layers_done, const moec_stats *stats, const moec_carry *carry,
                                 const moec_hidden *hidden, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *path = NULL, *file = NULL;
    int turn = 1 - c->turn;
    bool on_disk = moec_hidden_on_disk(hidden);
    MOEC_TRY(moec_format(&path, err, "%s/carry.%d", c->dir, turn));
    MOEC_TRY(moec_format(&file, err, "%s/stats.%d.h5", c->dir, turn));
    MOEC_TRY(write_carry(path, carry, hidden, err));
    MOEC_TRY(moec_stats_save(stats, file, err));
    MOEC_TRY(write_state(c, layers_done, turn, on_disk, err));
    c->turn = turn;
    c->layers_done = layers_done;
    c->on_disk = on_disk;
done:
    moec_free(path);
    moec_free(file);
    return st;
}
