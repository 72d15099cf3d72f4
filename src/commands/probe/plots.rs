//! Plots of a fit, as SVG.

use std::path::Path;

use plotters::prelude::*;

use super::report::{FitReport, Measures};

const FONT: &str = "sans-serif";
/// Colors that can be told apart without red and green (palette of Okabe and Ito).
const COLORS: [RGBColor; 4] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
];
const GRAY: RGBColor = RGBColor(120, 120, 120);
/// Classes up to which a confusion matrix is drawn; more would have no names.
pub(super) const CONFUSION_MAX: usize = 40;
/// Side of a cell of the matrix, in pixels.
const CELL: u32 = 28;

type DrawResult = Result<(), Box<dyn std::error::Error>>;

/// Writes the plot of accuracies by layer.
///
/// # Errors
///
/// When the file cannot be written.
pub(super) fn layers(path: &Path, report: &FitReport) -> anyhow::Result<()> {
    draw_layers(path, report)
        .map_err(|error| anyhow::anyhow!("{} cannot be drawn: {error}", path.display()))
}

/// Writes the confusion matrix; returns false if there are too many classes.
///
/// # Errors
///
/// When the file cannot be written.
pub(super) fn confusion(
    path: &Path,
    names: &[String],
    measures: &Measures,
) -> anyhow::Result<bool> {
    if names.len() > CONFUSION_MAX || measures.confusion.is_empty() {
        return Ok(false);
    }
    draw_confusion(path, names, measures)
        .map_err(|error| anyhow::anyhow!("{} cannot be drawn: {error}", path.display()))?;
    Ok(true)
}

fn draw_layers(path: &Path, report: &FitReport) -> DrawResult {
    let has_test = report.examples.test > 0;
    let part = if has_test { "test" } else { "validation" };
    let accuracy = |figures: &super::report::FitFigures| {
        100.0
            * if has_test {
                figures.test_accuracy
            } else {
                figures.validation_accuracy
            }
            .unwrap_or_default()
    };
    let mut series: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
    for figures in &report.layers {
        let (Some(context), Some(norm), Some(layer)) =
            (&figures.context, &figures.norm, figures.layer)
        else {
            continue;
        };
        let name = format!("{context}, {norm}");
        let point = (f64::from(layer), accuracy(figures));
        match series.iter_mut().find(|(known, _)| *known == name) {
            Some((_, points)) => points.push(point),
            None => series.push((name, vec![point])),
        }
    }
    let lines: Vec<(String, f64)> = (report.baselines.iter())
        .map(|figures| (figures.features.clone(), accuracy(figures)))
        .chain(report.guesses.iter().flat_map(|guesses| {
            [
                (
                    "majority class".to_owned(),
                    100.0 * guesses.majority_accuracy,
                ),
                ("chance".to_owned(), 100.0 * guesses.chance_accuracy),
            ]
        }))
        .collect();
    let all = series.iter().flat_map(|(_, points)| points);
    let last = all.map(|(layer, _)| *layer).fold(1.0, f64::max);
    let canvas = SVGBackend::new(path, (960, 600)).into_drawing_area();
    canvas.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&canvas)
        .caption(format!("accuracy on the {part} part by layer"), (FONT, 18))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..last * 1.02, 0.0..100.0)?;
    chart
        .configure_mesh()
        .x_desc("layer")
        .y_desc("accuracy in percent")
        .axis_desc_style((FONT, 15))
        .label_style((FONT, 13))
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 225, 225))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .draw()?;
    for ((name, points), color) in series.iter().zip(COLORS.into_iter().cycle()) {
        let line = LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(4);
        chart
            .draw_series(line)?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
    }
    for (name, height) in &lines {
        let line = [(0.0, *height), (last, *height)];
        chart.draw_series(LineSeries::new(line, GRAY.stroke_width(1)))?;
        let place = (last * 0.01, *height + 3.0);
        chart.draw_series([Text::new(name.clone(), place, (FONT, 13))])?;
    }
    chart
        .configure_series_labels()
        .label_font((FONT, 13))
        .background_style(WHITE)
        .border_style(RGBColor(225, 225, 225))
        .position(SeriesLabelPosition::LowerRight)
        .draw()?;
    canvas.present()?;
    Ok(())
}

fn draw_confusion(path: &Path, names: &[String], measures: &Measures) -> DrawResult {
    let n = u32::try_from(names.len())?;
    let longest = names.iter().map(|name| name.chars().count()).max();
    let margin = 40 + 8 * u32::try_from(longest.unwrap_or(0).min(40))?;
    let size = (margin + n * CELL + 16, margin + n * CELL + 16);
    let canvas = SVGBackend::new(path, size).into_drawing_area();
    canvas.fill(&WHITE)?;
    let place = |name: &String| names.iter().position(|known| known == name);
    let pixel = |value: usize| -> Result<i32, std::num::TryFromIntError> {
        i32::try_from(margin + u32::try_from(value)? * CELL)
    };
    let side = i32::try_from(CELL)?;
    for (label, predicted, count) in &measures.confusion {
        let (Some(row), Some(column)) = (place(label), place(predicted)) else {
            continue;
        };
        let of_class = measures
            .classes
            .get(row)
            .map_or(1, |class| class.examples.max(1));
        #[expect(clippy::cast_precision_loss, reason = "a shade")]
        let share = *count as f64 / of_class as f64;
        let (x, y) = (pixel(column)?, pixel(row)?);
        let shade = COLORS[0].mix(0.05 + 0.95 * share);
        canvas.draw(&Rectangle::new(
            [(x, y), (x + side, y + side)],
            shade.filled(),
        ))?;
        let ink = if share > 0.6 { &WHITE } else { &BLACK };
        let style = (FONT, 11).into_font().color(ink);
        canvas.draw(&Text::new(count.to_string(), (x + 4, y + 9), style))?;
    }
    // Control characters have no place in a file of XML.
    let shown = |name: &String| name.replace(char::is_control, "?");
    for (row, name) in names.iter().map(shown).enumerate() {
        let style = (FONT, 13).into_font().color(&BLACK);
        canvas.draw(&Text::new(
            name.clone(),
            (8, pixel(row)? + 8),
            style.clone(),
        ))?;
        let turned = style.transform(FontTransform::Rotate270);
        let below = (pixel(row)? + 8, i32::try_from(margin)? - 8);
        canvas.draw(&Text::new(name.clone(), below, turned))?;
    }
    let style = (FONT, 13).into_font().color(&GRAY);
    canvas.draw(&Text::new(
        "rows: labels; columns: predictions",
        (8, 8),
        style,
    ))?;
    canvas.present()?;
    Ok(())
}
