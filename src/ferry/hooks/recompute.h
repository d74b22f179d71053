// Training under offload: a module whose weights come and go is one node of the autograd graph.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "ferry/nn/module.h"

namespace ferry::hooks {

// Runs `body` on `inputs` without a graph, and returns its outputs as those of one autograd
// function that saves the inputs and the CPU generator's state. Its backward holds what `hold`
// returns (a lease of the weights), runs the body again with a graph, and gives the gradients of
// the inputs; those of parameters are accumulated into their grad. So no memory of the arena is
// ever part of a graph: a saved weight there would be another one's by the time of the backward.
// With nothing that requires grad, it just runs the body.
std::vector<at::Tensor> recompute_in_backward(const nn::Module& module,
                                              const std::vector<at::Tensor>& inputs,
                                              const nn::RecomputeBody& body,
                                              std::function<std::shared_ptr<void>()> hold);

}  // namespace ferry::hooks
