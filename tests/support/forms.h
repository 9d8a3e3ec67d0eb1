/* What the tests of pruning share: tiny checkpoints made over tensor by tensor, plans carried out and compared through the
 * model's own eyes. Failures end the test. */
#ifndef MOEC_TESTS_FORMS_H
#define MOEC_TESTS_FORMS_H

#include "ckpt/safetensors.h"
#include "method/method.h"
#include "tiny.h"

/* Of the running test program. */
extern char *forms_folder, *forms_source, *forms_out;

enum { FORMS_POOL = 512 };
typedef struct forms_pool {
    moec_st_entry entry[FORMS_POOL];
    void *data[FORMS_POOL];
    size_t n;
    char *config;
} forms_pool;

int forms_set_up(void **state);
int forms_tear_down(void **state);
moec_model *forms_open_dir(const char *dir);
void forms_write_tiny(const char *family, int64_t width, moec_dtype dtype);
moec_request forms_request(const moec_model *m, const moec_digest *print, int64_t keep);
moec_plan *forms_plan_of(const moec_request *q);
void forms_refuse_request(const moec_request *q, const char *says);
moec_model *forms_apply(const moec_model *m, const moec_plan *p);
float forms_value(const moec_tensor *t, int64_t i);
void forms_same_experts(const moec_model *m, const moec_model *o, const moec_plan *p);
void forms_pool_add(forms_pool *x, const char *name, moec_dtype dtype, int rank, const int64_t *dim, const void *data);
forms_pool *forms_pool_of(const char *without);
void forms_pool_key(forms_pool *x, const char *text);
void forms_pool_edit(forms_pool *x, const char *key, const char *with);
void forms_pool_write(forms_pool *x);
int64_t forms_config_int(const moec_model *m, const char *path);
void forms_check_dead(const moec_model *o, const moec_plan *p);

#endif
