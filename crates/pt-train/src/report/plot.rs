//! Line plots as inline SVG: axes with ticks at round numbers, curves, tooltips.

use std::fmt::Write as _;

use super::escape;

/// One curve of a plot.
pub(super) struct Curve<'a> {
    /// Name in legend and tooltips.
    pub(super) name: &'a str,
    /// `(x, value)`; values that are not finite leave a gap.
    pub(super) points: Vec<(f64, f64)>,
    /// Draw a running mean over a faint raw line.
    pub(super) smooth: bool,
    /// Mark each point.
    pub(super) dots: bool,
}

/// One plot.
pub(super) struct Plot<'a> {
    pub(super) title: &'a str,
    pub(super) unit: &'a str,
    /// What the x axis counts; [`STEP`]s are whole numbers.
    pub(super) x: &'a str,
    pub(super) curves: Vec<Curve<'a>>,
    /// The y axis begins at 0.
    pub(super) from_zero: bool,
    /// Takes the whole width of the page.
    pub(super) wide: bool,
}

/// The x axis of a metric.
pub(super) const STEP: &str = "step";
/// A curve keeps at most this many points; more could not be told apart on a screen.
const MOST_POINTS: usize = 400;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 34.0;

impl Plot<'_> {
    /// The plot as a card, empty when no curve has a finite point.
    pub(super) fn to_html(&self) -> String {
        let is_whole = self.x == STEP;
        let (width, height) = if self.wide { (1060.0, 320.0) } else { (520.0, 230.0) };
        let curves: Vec<Vec<(f64, f64)>> = self.curves.iter().map(|curve| thin(&curve.points)).collect();
        let finite = || curves.iter().flatten().filter(|(_, value)| value.is_finite());
        let Some((x_range, y_range)) = ranges(finite(), self.from_zero) else { return String::new() };
        let (x_ticks, y_ticks) = (ticks(x_range, if self.wide { 10 } else { 5 }, is_whole), ticks(y_range, 5, false));
        // The y axis ends at ticks, the x axis where the data ends.
        let y_range = (y_ticks.low.min(y_range.0), y_ticks.high.max(y_range.1));
        let x_of = |x: f64| LEFT + (x - x_range.0) / (x_range.1 - x_range.0) * (width - LEFT - RIGHT);
        let y_of = |y: f64| height - BOTTOM - (y - y_range.0) / (y_range.1 - y_range.0) * (height - TOP - BOTTOM);
        let mut svg =
            format!("<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">", escape(self.title));
        for &tick in &y_ticks.at {
            let y = y_of(tick);
            let label = y_ticks.label(tick);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>",
                width - RIGHT
            );
            let _ = write!(svg, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>", LEFT - 8.0, y + 4.0);
        }
        let floor = height - BOTTOM;
        let _ =
            write!(svg, "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{floor}\" y2=\"{floor}\"/>", width - RIGHT);
        for &tick in x_ticks.at.iter().filter(|&&tick| tick >= x_range.0 && tick <= x_range.1) {
            let (x, label) = (x_of(tick), x_ticks.label(tick));
            let _ =
                write!(svg, "<line class=\"axis\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{floor}\" y2=\"{}\"/>", floor + 4.0);
            let _ = write!(svg, "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>", floor + 17.0);
        }
        let middle = (LEFT + width - RIGHT) / 2.0;
        let (below, label) = (height - 3.0, escape(self.x));
        let _ = write!(svg, "<text x=\"{middle}\" y=\"{below}\" text-anchor=\"middle\">{label}</text>");
        for (index, (curve, points)) in self.curves.iter().zip(&curves).enumerate() {
            let colour = colour(index);
            let place = |points: &[(f64, f64)]| path(points.iter().map(|&(x, y)| (x_of(x), y_of(y))));
            if curve.smooth && points.len() > 8 {
                let _ = write!(svg, "<path class=\"curve faint {colour}\" d=\"{}\"/>", place(points));
                let _ = write!(svg, "<path class=\"curve {colour}\" d=\"{}\"/>", place(&smoothed(points)));
            } else {
                let _ = write!(svg, "<path class=\"curve {colour}\" d=\"{}\"/>", place(points));
            }
            for &(x, y) in points.iter().filter(|(_, y)| y.is_finite()) {
                let (class, radius) = if curve.dots { ("dot", 3.5) } else { ("hit", 5.0) };
                let at = if is_whole { x.round().to_string() } else { significant(x) };
                let tip = format!("{} at {} {at}: {} {}", curve.name, self.x, significant(y), self.unit);
                let _ = write!(
                    svg,
                    "<circle class=\"{class} {colour}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius}\"><title>{}</title></circle>",
                    x_of(x),
                    y_of(y),
                    escape(tip.trim_end())
                );
            }
        }
        svg.push_str("</svg>");
        let legend = if self.curves.len() > 1 { self.legend() } else { String::new() };
        let unit = if self.unit.is_empty() { String::new() } else { format!(" <span>({})</span>", escape(self.unit)) };
        let wide = if self.wide { " wide" } else { "" };
        let title = escape(self.title);
        format!(
            "<div class=\"card{wide}\"><div class=\"chart-head\"><div class=\"chart-title\">{title}{unit}</div>{legend}</div>{svg}</div>\n"
        )
    }

    fn legend(&self) -> String {
        let entry = |(index, curve): (usize, &Curve<'_>)| {
            format!("<span><i class=\"{}\"></i>{}</span>", colour(index), escape(curve.name))
        };
        format!("<div class=\"legend\">{}</div>", self.curves.iter().enumerate().map(entry).collect::<String>())
    }
}

/// At most 5 significant digits, no trailing zeros.
pub(super) fn significant(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let magnitude = value.abs().log10().floor() as i32;
    if !(-4..7).contains(&magnitude) {
        return scientific(value);
    }
    let text = format!("{value:.*}", (4 - magnitude).max(0) as usize);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// At most 4 significant digits and a power of ten.
fn scientific(value: f64) -> String {
    let text = format!("{value:.3e}");
    let (head, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    format!("{}e{exponent}", head.trim_end_matches('0').trim_end_matches('.'))
}

fn colour(index: usize) -> &'static str {
    if index.is_multiple_of(2) { "one" } else { "two" }
}

type Range = (f64, f64);

fn ranges<'a>(points: impl Iterator<Item = &'a (f64, f64)>, from_zero: bool) -> Option<(Range, Range)> {
    let grow = |range: Option<Range>, value: f64| {
        Some(range.map_or((value, value), |(low, high)| (low.min(value), high.max(value))))
    };
    let (x_range, y_range) = points.fold((None, None), |(xs, ys), &(x, y)| (grow(xs, x), grow(ys, y)));
    let (mut x_range, mut y_range) = (x_range?, y_range?);
    if from_zero {
        y_range.0 = y_range.0.min(0.0);
    }
    // A single value still gets an axis round it.
    if x_range.0 == x_range.1 {
        x_range = (x_range.0 - 1.0, x_range.1 + 1.0);
    }
    if y_range.0 == y_range.1 {
        let margin = if y_range.0 == 0.0 { 1.0 } else { y_range.0.abs() * 0.1 };
        y_range = (y_range.0 - margin, y_range.1 + margin);
    }
    Some((x_range, y_range))
}

struct Ticks {
    at: Vec<f64>,
    low: f64,
    high: f64,
    spacing: f64,
}

impl Ticks {
    fn label(&self, tick: f64) -> String {
        let largest = self.low.abs().max(self.high.abs());
        if largest < 1e-3 && largest > 0.0 {
            return if tick == 0.0 { "0".into() } else { scientific(tick) };
        }
        let (scale, suffix) = match largest {
            largest if largest >= 1e7 => (1e6, "M"),
            largest if largest >= 1e4 => (1e3, "k"),
            _ => (1.0, ""),
        };
        let decimals = (-(self.spacing / scale).log10().floor()).max(0.0) as usize;
        format!("{:.decimals$}{suffix}", tick / scale)
    }
}

/// About `wanted` ticks at 1, 2 or 5 times a power of ten.
fn ticks((low, high): Range, wanted: usize, whole: bool) -> Ticks {
    let rough = (high - low) / wanted as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let mut spacing =
        [1.0, 2.0, 5.0, 10.0].map(|times| times * power).into_iter().find(|spacing| *spacing >= rough).unwrap_or(rough);
    if whole {
        spacing = spacing.max(1.0);
    }
    let (first, last) = ((low / spacing + 1e-9).floor(), (high / spacing - 1e-9).ceil());
    let count = (last - first).clamp(0.0, 100.0) as usize;
    // From whole multiples, so that 3 * 0.1 is not 0.30000000000000004 and nothing is -0.
    let at: Vec<f64> = (0..=count).map(|index| (first + index as f64) * spacing + 0.0).collect();
    Ticks { at, low: first * spacing, high: last * spacing, spacing }
}

/// Means over runs of points, so that at most [`MOST_POINTS`] stay.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let run = points.len().div_ceil(MOST_POINTS).max(1);
    let mean = |run: &[(f64, f64)]| {
        let count = run.len() as f64;
        (run.iter().map(|(x, _)| x).sum::<f64>() / count, run.iter().map(|(_, y)| y).sum::<f64>() / count)
    };
    points.chunks(run).map(mean).collect()
}

/// Exponential running mean, corrected for its start, over about a twentieth of the points.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 20.0).max(3.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mut step = |&(x, y): &(f64, f64)| {
        if y.is_finite() {
            sum = keep * sum + y;
            weight = keep * weight + 1.0;
        }
        (x, if y.is_finite() { sum / weight } else { y })
    };
    points.iter().map(&mut step).collect()
}

fn path(points: impl Iterator<Item = (f64, f64)>) -> String {
    let mut text = String::new();
    let mut pen_down = false;
    for (x, y) in points {
        if y.is_finite() {
            let _ = write!(text, "{}{x:.1} {y:.1}", if pen_down { 'L' } else { 'M' });
        }
        pen_down = y.is_finite();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ticks_stand_at_round_numbers() {
        let labels = |low, high| {
            let ticks = ticks((low, high), 5, false);
            ticks.at.iter().map(|&tick| ticks.label(tick)).collect::<Vec<_>>()
        };
        assert_eq!(labels(0.0, 1.0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(0.0, 2e-5), ["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]);
        assert_eq!(labels(0.0, 2e-4), ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]);
        assert_eq!(labels(9_800.0, 12_100.0), ["9.5k", "10.0k", "10.5k", "11.0k", "11.5k", "12.0k", "12.5k"]);
        assert_eq!(labels(-1.0, 1.0), ["-1.0", "-0.5", "0.0", "0.5", "1.0"]);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [0.0, 1.0, 0.12345678, 123456.78, 2e-5, 1.5e9].map(significant),
            ["0", "1", "0.12346", "123457", "2e-5", "1.5e9"]
        );
    }

    #[test]
    fn a_gap_stands_where_a_value_is_not_finite() {
        assert_eq!(path([(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0), (3.0, 4.0)].into_iter()), "M0.0 1.0M2.0 3.0L3.0 4.0");
    }

    proptest! {
        #[test]
        fn any_points_make_a_plot_without_bad_numbers(values in prop::collection::vec(prop::num::f64::ANY, 0..30), start: u32) {
            let points = values.iter().map(|value| value.clamp(-1e30, 1e30)).enumerate();
            let points = points.map(|(i, v)| (f64::from(start) + i as f64, v)).collect();
            let curves = vec![Curve { name: "a", points, smooth: true, dots: false }];
            let html = Plot { title: "t", unit: "", x: STEP, curves, from_zero: false, wide: false }.to_html();
            prop_assert_eq!(html.is_empty(), !values.iter().any(|value| !value.is_nan()));
            let svg = html.split("<title>").map(|part| part.rsplit("</title>").next().unwrap_or("")).collect::<String>();
            prop_assert!(!svg.contains("NaN") && !svg.contains("\"inf"), "{}", html);
        }
    }
}
