//! Line charts as SVG.

use std::fmt::Write;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 60.0;
/// Told apart also by who sees few colours.
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

/// How numbers are laid out along an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Evenly, from 0.
    Linear,
    /// By their logarithm.
    Logarithmic,
    /// Percentiles, so that 90, 99 and 99.9 are as far apart.
    Percentile,
}

impl Scale {
    fn place(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Logarithmic => value.max(f64::MIN_POSITIVE).log10(),
            Self::Percentile => -(1.0 - value.min(99.99) / 100.0).log10(),
        }
    }

    /// Where there is a mark, of the numbers that are shown.
    fn marks(self, least: f64, most: f64) -> Vec<f64> {
        match self {
            Self::Percentile => vec![0.0, 50.0, 90.0, 99.0, 99.9],
            Self::Logarithmic => {
                let (first, last) = (least.log10().floor() as i32, most.log10().ceil() as i32);
                (first..=last).map(|power| 10_f64.powi(power)).collect()
            }
            Self::Linear => {
                let raw = most / 5.0;
                let power = 10_f64.powf(raw.log10().floor());
                let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
                let step = steps.into_iter().find(|step| *step >= raw).unwrap_or(raw);
                let count = (most / step).ceil() as u32;
                (0..=count).map(|nth| f64::from(nth) * step).collect()
            }
        }
    }
}

/// Lines over two axes.
#[derive(Debug, Clone)]
pub struct Chart {
    /// What it shows.
    pub title: String,
    /// What is along the horizontal axis, and how.
    pub x: (&'static str, Scale),
    /// What is along the vertical axis, and how.
    pub y: (&'static str, Scale),
    /// Each line's name and points.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

/// One axis: from numbers to places.
struct Axis {
    scale: Scale,
    marks: Vec<f64>,
    least: f64,
    most: f64,
    from: f64,
    to: f64,
}

impl Axis {
    fn new(scale: Scale, values: impl Iterator<Item = f64> + Clone, from: f64, to: f64) -> Self {
        let finite = values.filter(|value| value.is_finite() && *value >= 0.0);
        let most = finite.clone().fold(f64::MIN_POSITIVE, f64::max);
        let positive = finite.filter(|value| *value > 0.0);
        let marks = scale.marks(positive.fold(most, f64::min), most);
        let places = || marks.iter().map(|mark| scale.place(*mark));
        let least = places().fold(f64::INFINITY, f64::min);
        let most = places().fold(f64::NEG_INFINITY, f64::max);
        Self { scale, least, most: if most > least { most } else { least + 1.0 }, marks, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (self.scale.place(value) - self.least) / (self.most - self.least);
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }
}

impl Chart {
    /// The picture.
    pub fn svg(&self) -> String {
        let points = || self.lines.iter().flat_map(|(_, points)| points);
        let x = Axis::new(self.x.1, points().map(|point| point.0), LEFT, WIDTH - RIGHT);
        let y = Axis::new(self.y.1, points().map(|point| point.1), HEIGHT - BOTTOM, TOP);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
        );
        text(&mut svg, (WIDTH / 2.0, 20.0), "middle", &self.title);
        text(&mut svg, (WIDTH / 2.0, HEIGHT - 28.0), "middle", self.x.0);
        text(&mut svg, (4.0, TOP - 8.0), "start", self.y.0);
        for mark in &x.marks {
            let at = x.at(*mark);
            line(&mut svg, (at, TOP), (at, HEIGHT - BOTTOM));
            text(&mut svg, (at, HEIGHT - BOTTOM + 16.0), "middle", &label(*mark));
        }
        for mark in &y.marks {
            let at = y.at(*mark);
            line(&mut svg, (LEFT, at), (WIDTH - RIGHT, at));
            text(&mut svg, (LEFT - 6.0, at + 4.0), "end", &label(*mark));
        }
        for (nth, (name, points)) in self.lines.iter().enumerate() {
            let colour = COLOURS[nth % COLOURS.len()];
            let path = points.iter().map(|(px, py)| format!("{:.1},{:.1}", x.at(*px), y.at(*py)));
            let path = path.collect::<Vec<_>>().join(" ");
            put(
                &mut svg,
                format_args!(
                    "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n"
                ),
            );
            let at = LEFT + nth as f64 * (WIDTH - LEFT - RIGHT) / self.lines.len() as f64;
            put(
                &mut svg,
                format_args!(
                    "<rect x=\"{at:.1}\" y=\"{:.1}\" width=\"10\" height=\"10\" fill=\"{colour}\"/>\n",
                    HEIGHT - 18.0
                ),
            );
            text(&mut svg, (at + 14.0, HEIGHT - 9.0), "start", name);
        }
        svg.push_str("</svg>\n");
        svg
    }
}

fn put(svg: &mut String, what: std::fmt::Arguments<'_>) {
    // Writing into a string does not fail.
    let _ = svg.write_fmt(what);
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, what: &str) {
    let what = what.replace('&', "&amp;").replace('<', "&lt;");
    put(
        svg,
        format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{what}</text>\n"),
    );
}

fn line(svg: &mut String, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    put(
        svg,
        format_args!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"#ddd\"/>\n"
        ),
    );
}

fn label(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{} M", value / 1e6),
        value if value >= 1e4 => format!("{} k", value / 1e3),
        value => format!("{}", (value * 1e3).round() / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_goes_from_corner_to_corner() {
        let chart = Chart {
            title: "a < b".into(),
            x: ("callers", Scale::Logarithmic),
            y: ("events/s", Scale::Linear),
            lines: vec![("ours".into(), vec![(1.0, 0.0), (1_000.0, 50.0)])],
        };
        let svg = chart.svg();
        assert!(svg.contains("points=\"80.0,340.0 620.0,40.0\""), "{svg}");
        assert!(svg.contains("a &lt; b"), "{svg}");
    }
}
