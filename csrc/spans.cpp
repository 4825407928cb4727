#include "spans.h"

#include <algorithm>

namespace prism {
namespace {

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }  // ASCII, whatever the locale

bool has_at(std::string_view text, size_t at, std::string_view marker) {
  return text.compare(at, marker.size(), marker) == 0;
}

// The byte after the element's closing tag, or npos. Only `close` may occur before it, none of the other markers.
size_t end_of_element(std::string_view text, size_t at, const std::vector<std::string_view>& markers, size_t close) {
  for (at = text.find('<', at); at != text.npos; at = text.find('<', at + 1)) {
    for (size_t m = 0; m < markers.size(); ++m) {
      if (has_at(text, at, markers[m])) return m == close ? at + markers[m].size() : text.npos;
    }
  }
  return text.npos;
}

}  // namespace

std::optional<std::vector<std::pair<int64_t, int64_t>>> find_tag_spans(std::string_view text,
                                                                       const std::vector<size_t>& token_end,
                                                                       const std::vector<std::string_view>& markers) {
  auto token_with = [&](size_t byte) {
    return std::upper_bound(token_end.begin(), token_end.end(), byte) - token_end.begin();
  };
  std::vector<std::pair<int64_t, int64_t>> spans;
  size_t at = 0;
  auto skip_space = [&] {
    while (at < text.size() && is_space(text[at])) ++at;
  };
  for (size_t m = 0; m < markers.size(); m += 2) {
    skip_space();
    if (!has_at(text, at, markers[m])) return std::nullopt;
    const size_t begin = at;
    at = end_of_element(text, at + markers[m].size(), markers, m + 1);
    if (at == text.npos) return std::nullopt;
    spans.emplace_back(token_with(begin), token_with(at - 1) + 1);
  }
  skip_space();
  if (at != text.size()) return std::nullopt;
  return spans;
}

}  // namespace prism
