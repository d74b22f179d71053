// ferry: the command line.
#include "run.h"

#ifdef FERRY_WITH_JEMALLOC
// Activations are freed and made again all the time. By itself jemalloc gives the pages back in
// between: at 1024+256 tokens of a 2 GB Flux every step asked for 1.8 GB of fresh, zeroed ones. The
// engine gives back what is free when another component's turn comes.
extern "C" const char* malloc_conf;
const char* malloc_conf = "oversize_threshold:0,dirty_decay_ms:-1";
#endif

int main(int argc, char** argv) {
  return ferry::cli::run_command_line(argc, argv);
}
