// Which tokens hold each element of a tagged text: the native form of kernels/prism_kernels/spans/reference.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace prism {

// text: the tokens' bytes one after the other; token_end (count,): where each ends. markers: opening and closing tag of
// every element in order, each beginning with its only '<'. -> half-open token spans, or nothing if the format is invalid.
std::optional<std::vector<std::pair<int64_t, int64_t>>> find_tag_spans(std::string_view text,
                                                                       const std::vector<size_t>& token_end,
                                                                       const std::vector<std::string_view>& markers);

}  // namespace prism
