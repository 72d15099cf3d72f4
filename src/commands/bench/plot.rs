//! Plot of latency against load.

use std::path::Path;

use plotters::prelude::*;

use super::load::{LoadShape, Measurement};
use super::stats::Percentiles;

const SIZE: (u32, u32) = (960, 600);
const FONT: &str = "sans-serif";

/// Percentiles that are drawn, and their colors, which can also be told apart
/// without red and green (palette of Okabe and Ito).
type Line = (&'static str, fn(&Percentiles) -> f64, RGBColor);
const LINES: [Line; 4] = [
    ("p50", |l| l.p50_ms, RGBColor(0, 114, 178)),
    ("p90", |l| l.p90_ms, RGBColor(0, 158, 115)),
    ("p99", |l| l.p99_ms, RGBColor(230, 159, 0)),
    ("p99.9", |l| l.p99_9_ms, RGBColor(213, 94, 0)),
];
const GRAY: RGBColor = RGBColor(120, 120, 120);

/// Data of the plot: latencies in order of load.
struct Picture<'a> {
    title: String,
    x_name: &'a str,
    points: Vec<(f64, Percentiles)>,
    /// Vertical line at this load, with its name.
    x_mark: Option<(f64, String)>,
}

/// Writes the plot as SVG; returns `false` if there is nothing to draw.
///
/// # Errors
///
/// When the file cannot be written.
pub(super) fn draw(path: &Path, title: &str, phases: &[Measurement]) -> anyhow::Result<bool> {
    let Some(picture) = picture(title, phases) else {
        return Ok(false);
    };
    render(path, &picture)
        .map_err(|error| anyhow::anyhow!("--plot {} cannot be drawn: {error}", path.display()))?;
    Ok(true)
}

/// Points of open loops by offered rate, or, without any, points of closed
/// loops by number of callers.
fn picture<'a>(title: &str, phases: &[Measurement]) -> Option<Picture<'a>> {
    let open = |phase: &Measurement| match phase.shape {
        LoadShape::Open {
            offered_images_per_second,
        } => Some((offered_images_per_second, phase.counts.latency?)),
        LoadShape::Closed { .. } => None,
    };
    let closed = |phase: &Measurement| match phase.shape {
        LoadShape::Closed { callers } => Some((
            f64::from(u32::try_from(callers).ok()?),
            phase.counts.latency?,
        )),
        LoadShape::Open { .. } => None,
    };
    let saturation = phases.iter().find(|phase| closed(phase).is_some());
    let saturation = saturation.map(|phase| phase.counts.images_per_second);
    let mut points: Vec<_> = phases.iter().filter_map(open).collect();
    let (x_name, x_mark) = if points.is_empty() {
        points = phases.iter().filter_map(closed).collect();
        ("callers", None)
    } else {
        let mark = saturation.map(|x| (x, format!("saturation {x:.0}")));
        ("offered images/s", mark)
    };
    if points.is_empty() {
        return None;
    }
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    Some(Picture {
        title: title.to_owned(),
        x_name,
        points,
        x_mark,
    })
}

fn render(path: &Path, picture: &Picture<'_>) -> Result<(), Box<dyn std::error::Error>> {
    let xs = picture.points.iter().map(|(x, _)| *x);
    let x_max = xs
        .chain(picture.x_mark.iter().map(|(x, _)| *x))
        .fold(0.0, f64::max);
    let all = || {
        let points = picture.points.iter();
        points.flat_map(|(_, l)| LINES.map(|(_, of, _)| of(l)))
    };
    // A logarithmic axis has no zero; a microsecond is below every measured
    // latency.
    let y_min = all().fold(f64::INFINITY, f64::min).max(1e-3) / 1.5;
    let y_max = all().fold(y_min, f64::max) * 1.5;
    let y_axis = (y_min..y_max)
        .log_scale()
        .with_key_points(ticks(y_min, y_max));
    let canvas = SVGBackend::new(path, SIZE).into_drawing_area();
    canvas.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&canvas)
        .caption(&picture.title, (FONT, 18))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..x_max * 1.05, y_axis)?;
    chart
        .configure_mesh()
        .x_desc(picture.x_name)
        .y_desc("latency in ms, from when a call was due")
        .axis_desc_style((FONT, 15))
        .label_style((FONT, 13))
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 225, 225))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| significant(*y))
        .draw()?;
    if let Some((x, name)) = &picture.x_mark {
        let line = [(*x, y_min), (*x, y_max)];
        chart
            .draw_series(LineSeries::new(line, GRAY.stroke_width(1)))?
            .label(name)
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], GRAY));
    }
    for (name, of, color) in LINES.into_iter().rev() {
        let points: Vec<(f64, f64)> = picture.points.iter().map(|(x, l)| (*x, of(l))).collect();
        chart
            .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        let dots = points
            .into_iter()
            .map(|at| Circle::new(at, 4, color.filled()));
        chart.draw_series(dots)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(225, 225, 225))
        .label_font((FONT, 14))
        .draw()?;
    canvas.present()?;
    Ok(())
}

/// Ticks at 1, 2 and 5 of each decade. The default ticks of a logarithmic axis
/// vanish where the axis contains no power of ten.
fn ticks(min: f64, max: f64) -> Vec<f64> {
    let decades = (-6..=9).map(|power| 10_f64.powi(power));
    decades
        .flat_map(|decade| [decade, 2.0 * decade, 5.0 * decade])
        .filter(|tick| (min..=max).contains(tick))
        .collect()
}

/// Formats a tick with as few digits as tell neighboring ticks apart.
fn significant(number: f64) -> String {
    match number {
        _ if number >= 1.0 => format!("{number:.0}"),
        _ if number >= 0.1 => format!("{number:.1}"),
        _ if number >= 0.01 => format!("{number:.2}"),
        _ => format!("{number:.3}"),
    }
}
