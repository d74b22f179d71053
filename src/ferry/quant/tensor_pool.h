// The tensors of a checkpoint while formats take theirs out.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ferry/quant/stored_weights.h"

namespace ferry::quant {

// The bytes of a small tensor.
using ReadText = std::function<std::string(const weights::StoredTensor&)>;
std::string read_bytes(const weights::StoredTensor& tensor);

class TensorPool {
 public:
  // Over weights.plain, which must not change until commit().
  explicit TensorPool(StoredWeights& weights);

  // Null where the checkpoint has no such key.
  const weights::StoredTensor* find(const std::string& key) const;
  // Throws FormatError naming parameter and key where there is none.
  const weights::StoredTensor& get(const std::string& key, const std::string& parameter) const;

  // Makes `parameter` a quantized weight of the tensors under `keys`, in the order of the weight's
  // components. Throws FormatError for a key that is not there, a dtype or shape that is not the
  // component's, or a parameter that is there already.
  void join(const std::string& parameter, std::shared_ptr<const QuantizedWeight> weight,
            const std::vector<std::string>& keys);
  // The tensor under `key` is no parameter (a description, a marker); nothing where there is none.
  void drop(const std::string& key);
  // The same bytes as another shape: formats spell one scale [], [1] and [1, 1].
  void reshape(const std::string& key, const std::vector<int64_t>& shape);
  // Takes out of weights.plain what was joined and dropped.
  void commit();

  // For messages: the file of `key`, or "checkpoint".
  std::string where(const std::string& key) const;

 private:
  StoredWeights& weights_;
  std::unordered_map<std::string, size_t> by_key_;
  std::vector<bool> taken_;
};

// The shape of a linear layer's weight. Throws FormatError unless it is two extents of 1 to 2^30.
void check_matrix(const std::vector<int64_t>& shape, const std::string& where,
                  const std::string& parameter);

// What `make` returns; an ArgumentError of a weight's constructor becomes a FormatError that names
// `where` and `parameter`: here the arguments came from a file.
std::shared_ptr<const QuantizedWeight> make_weight(
    const std::string& where, const std::string& parameter,
    const std::function<std::shared_ptr<const QuantizedWeight>()>& make);

}  // namespace ferry::quant
