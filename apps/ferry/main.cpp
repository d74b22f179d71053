// ferry: the command line.
#include "run.h"

int main(int argc, char** argv) {
  return ferry::cli::run_command_line(argc, argv);
}
