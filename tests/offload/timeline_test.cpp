#include "ferry/offload/timeline.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace ferry::offload {
namespace {

TEST(Timeline, AsciiShowsWhatIsBusyWhen) {
  const std::vector<Span> spans = {{Resource::compute, 0, 0.0, 5.0},
                                   {Resource::compute, 1, 6.6, 10.0},
                                   {Resource::disk, 0, 2.0, 4.0},
                                   {Resource::disk, 1, 5.1, 5.3}};
  EXPECT_EQ(draw_ascii(spans, 10.0, 10),
            "         0   10.0 s\n"
            "compute  ##### .###\n"
            "disk       ## .    \n");
  EXPECT_EQ(draw_ascii(spans, 0, 10), "");
}

TEST(Timeline, SvgNamesEveryGroupAndEscapes) {
  std::vector<GroupCost> groups(2);
  groups[0].name = "a<b>&\"c\"";
  groups[1].name = "second";
  Plan plan;
  plan.placements = {Placement::resident, Placement::streamed};
  const std::string svg = draw_svg({{Resource::compute, 0, 0, 1}, {Resource::disk, 1, 0, 2}}, 2.0,
                                   groups, plan, "t<1>");
  EXPECT_THAT(svg, testing::StartsWith("<svg"));
  EXPECT_THAT(svg, testing::EndsWith("</svg>\n"));
  EXPECT_THAT(svg, testing::HasSubstr("a&lt;b&gt;&amp;&quot;c&quot;"));
  EXPECT_THAT(svg, testing::HasSubstr("t&lt;1&gt;"));
  EXPECT_THAT(svg, testing::HasSubstr("disk second: "));
  EXPECT_THAT(svg, testing::Not(testing::HasSubstr("link")));
  // The bar of 2 s is as wide as the axis, that of 1 s half as wide.
  EXPECT_THAT(svg, testing::HasSubstr("width=\"1000.00\""));
  EXPECT_THAT(svg, testing::HasSubstr("width=\"500.00\""));
}

}  // namespace
}  // namespace ferry::offload
