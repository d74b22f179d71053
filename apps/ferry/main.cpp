// ferry: the command line.
#include "allocator.h"
#include "run.h"

int main(int argc, char** argv) {
  ferry::cli::set_up_allocator();
  return ferry::cli::run_command_line(argc, argv);
}
