/* dump_gguf_model DIR STEM F32|F16|BF16 SHARD_BYTES: a checkpoint as STEM.gguf or, where it takes several files, in the folder
 * STEM.dir, without quantizing. */
#include "base/mem.h"
#include "run/gguf_model.h"
#include "run/gguf_tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static moec_status write_series(const char *stem, moec_gguf_out *g, moec_gguf_model *x, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_out *o = NULL;
    moec_writer *w = NULL;
    char *dir = NULL;
    MOEC_TRY(moec_format(&dir, err, "%s.dir", stem));
    MOEC_TRY(moec_out_new(&o, err));
    MOEC_TRY(moec_gguf_out_plan(o, g, "model", moec_gguf_model_rows, x, err));
    MOEC_TRY(moec_out_close(o, err));
    const moec_writer_options opt = {.dir = dir, .identity = "dump"};
    MOEC_TRY(moec_writer_open(&w, o, &opt, err));
    MOEC_TRY(moec_writer_run(w, err));
    MOEC_TRY(moec_writer_publish(w, err));
done:
    moec_writer_close(w);
    moec_out_free(o);
    moec_free(dir);
    return st;
}

int main(int argc, char **argv)
{
    moec_err err = {MOEC_OK, ""};
    moec_status st = MOEC_OK;
    moec_model *m = NULL;
    moec_gguf_model *x = NULL;
    moec_gguf_out *g = NULL;
    char *path = NULL;
    if (argc != 5)
        return 2;
    const uint32_t type = strcmp(argv[3], "F32") == 0 ? MOEC_GGML_F32 : strcmp(argv[3], "F16") == 0 ? MOEC_GGML_F16 : MOEC_GGML_BF16;
    MOEC_TRY(moec_model_open(&m, argv[1], &err));
    MOEC_TRY(moec_gguf_model_new(&x, m, type, &err));
    MOEC_TRY(moec_gguf_out_new(&g, &err));
    moec_gguf_model_describe(g, x, "tiny");
    MOEC_TRY(moec_gguf_tokenizer(g, m, &err));
    MOEC_TRY(moec_gguf_out_close(g, strtoull(argv[4], NULL, 10), &err));
    MOEC_TRY(moec_gguf_out_name(&path, g, argv[2], 0, &err));
    MOEC_TRY(moec_gguf_out_files(g) == 1 ? moec_gguf_write(path, g, moec_gguf_model_rows, x, &err)
                                         : write_series(argv[2], g, x, &err));
done:
    if (st != MOEC_OK)
        fprintf(stderr, "dump_gguf_model: %s\n", err.text);
    moec_free(path);
    moec_gguf_out_free(g);
    moec_gguf_model_free(x);
    moec_model_close(m);
    return moec_exit_code(st);
}
