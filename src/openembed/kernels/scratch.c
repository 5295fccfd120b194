#include <pthread.h>

#include "common.h"

typedef struct {
    void *memory;
    size_t bytes;
} Kept;

static __thread Kept kept[SCRATCH_SLOTS];
static pthread_key_t at_end;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void release(void *slots) {
    for (int slot = 0; slot < SCRATCH_SLOTS; slot++) free(((Kept *)slots)[slot].memory);
}

static void make_key(void) {
    pthread_key_create(&at_end, release);
}

void *scratch(int slot, size_t bytes) {
    if (kept[slot].bytes < bytes || !kept[slot].memory) {
        pthread_once(&once, make_key);
        pthread_setspecific(at_end, kept); /* freed when this thread ends */
        free(kept[slot].memory);
        bytes = (bytes + 4096) / 4096 * 4096;
        kept[slot].memory = aligned_alloc(4096, bytes);
        kept[slot].bytes = kept[slot].memory ? bytes : 0;
    }
    return kept[slot].memory;
}
