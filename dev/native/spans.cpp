// find_tag_spans against its definition (kernels/prism_kernels/spans/reference.py), on any text in any tokens.
#include "spans.h"

#include <algorithm>

#include "input.h"

namespace {

using Spans = std::vector<std::pair<int64_t, int64_t>>;

std::optional<Spans> defined(const std::string& text, const std::vector<size_t>& ends,
                             const std::vector<std::string>& markers) {
  std::vector<size_t> begins;
  for (const std::string& marker : markers) {
    const size_t at = text.find(marker);
    if (at == text.npos || text.find(marker, at + 1) != text.npos) return std::nullopt;
    if (!begins.empty() && begins.back() > at) return std::nullopt;
    begins.push_back(at);
  }
  std::vector<bool> inside(text.size(), false);
  Spans spans;
  for (size_t m = 0; m < markers.size(); m += 2) {
    const size_t first = begins[m], last = begins[m + 1] + markers[m + 1].size() - 1;
    std::fill(inside.begin() + first, inside.begin() + last + 1, true);
    const auto token = [&](size_t byte) {  // the first that ends after it
      return std::find_if(ends.begin(), ends.end(), [&](size_t end) { return end > byte; }) - ends.begin();
    };
    spans.emplace_back(token(first), token(last) + 1);
  }
  for (size_t i = 0; i < text.size(); ++i) {
    if (!inside[i] && std::string(" \t\n\v\f\r").find(text[i]) == std::string::npos) return std::nullopt;
  }
  return spans;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<std::vector<std::string>> kMarkers = {
      {"<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>"},
      {"<a>", "</a>", "<b>", "</b>"},
      {"<a>", "</a>", "<aa>", "</aa>", "<a.>", "</a.>"},
      {"<x>", "</x>"}};
  Input in(data, size);
  const std::vector<std::string>& markers = kMarkers[in.below(kMarkers.size())];
  std::string text;
  std::vector<size_t> ends;
  while (!in.empty()) {
    const uint8_t next = in.byte();
    if (next < markers.size()) text += markers[next];
    else if (next < 10) ends.push_back(text.size());  // a token ends; twice: an empty one
    else text += static_cast<char>(next);
  }
  ends.push_back(text.size());
  const auto found = prism::find_tag_spans(text, ends, {markers.begin(), markers.end()});
  HOLDS(found == defined(text, ends, markers));
  if (!found) return 0;
  for (size_t i = 0; i < found->size(); ++i) {
    const auto [first, last] = (*found)[i];
    HOLDS(0 <= first && first < last && last <= static_cast<int64_t>(ends.size()));
    const size_t begin = first == 0 ? 0 : ends[first - 1];
    const std::string held = text.substr(begin, ends[last - 1] - begin);
    HOLDS(held.find(markers[2 * i]) != held.npos && held.find(markers[2 * i + 1]) != held.npos);
    HOLDS(i == 0 || (*found)[i - 1].second - 1 <= first);
  }
  return 0;
}
