#include "allocator.h"

#include <cstdlib>

#ifdef FERRY_WITH_JEMALLOC
// Activations are freed and made again all the time. By itself jemalloc gives the pages back in
// between: at 1024+256 tokens of a 2 GB Flux every step asked for 1.8 GB of fresh, zeroed ones. The
// engine gives back what is free when another component's turn comes.
extern "C" const char* malloc_conf;
const char* malloc_conf = "oversize_threshold:0,dirty_decay_ms:-1,lg_extent_max_active_fit:63";
#endif

namespace ferry::cli {

void set_up_allocator() {
#ifdef FERRY_WITH_JEMALLOC
  // Leaves jemalloc one free extent that all else is cut from, at the lowest address where it fits.
  // By itself it grows in ever larger mappings and joins nothing across them: a decode of the VAE
  // then held 64 MiB of pages too small for what came next. Address space alone; where that is
  // limited and this is refused, jemalloc grows as it otherwise would.
  constexpr size_t kBytes = size_t{16} << 30;
  void* volatile extent = std::malloc(kBytes);
  std::free(extent);
#endif
}

}  // namespace ferry::cli
