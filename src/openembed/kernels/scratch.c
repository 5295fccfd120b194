#include "common.h"

static __thread struct {
    void *memory;
    size_t bytes;
} kept[SCRATCH_SLOTS];

void *scratch(int slot, size_t bytes) {
    if (kept[slot].bytes < bytes) {
        free(kept[slot].memory);
        bytes = (bytes + 4095) / 4096 * 4096;
        kept[slot].memory = aligned_alloc(4096, bytes);
        kept[slot].bytes = kept[slot].memory ? bytes : 0;
    }
    return kept[slot].memory;
}
