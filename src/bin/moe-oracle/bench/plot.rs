//! The plot: ratio to the floor over tokens, a line per layer and weight format.

use super::report::{Report, Row};
use crate::failure::{Failure, Outcome};
use plotters::prelude::*;
use std::path::Path;

/// Draws the report's rows.
pub fn write(file: &Path, report: &Report) -> Outcome {
    let mut svg = String::new();
    draw(&mut svg, report).map_err(|e| Failure::said(format_args!("the plot can't be drawn: {e}")))?;
    std::fs::write(file, svg).map_err(|e| Failure::said(format_args!("{} can't be written: {e}", file.display())))
}

/// Colours of the Okabe-Ito palette, which stay apart for colour-blind readers; then darker ones.
const COLOURS: [RGBColor; 12] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(120, 120, 120),
    RGBColor(0, 60, 110),
    RGBColor(120, 50, 0),
    RGBColor(0, 85, 60),
    RGBColor(110, 50, 90),
];

fn draw(svg: &mut String, report: &Report) -> Result<(), Box<dyn std::error::Error>> {
    let rows = &report.rows;
    let Some(first) = rows.first() else { return Err("there are no rows".into()) };
    let tokens = || rows.iter().map(|r| r.tokens as f64);
    let (low, high) = (tokens().fold(f64::INFINITY, f64::min), tokens().fold(0.0, f64::max));
    let top = rows.iter().map(|r| r.ratio).fold(1.0, f64::max) * 1.1;

    let root = SVGBackend::with_string(svg, (860, 520)).into_drawing_area();
    root.fill(&WHITE)?;
    let one = rows.iter().all(|r| r.preset == first.preset);
    let (what, m) = (if one { first.preset } else { "Layers" }, &report.machine);
    let title = match &m.gpu {
        Some(g) => format!("{what} on {}", g.gpu),
        None => format!("{what} on {} ({} threads)", m.cpu, first.threads),
    };
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(56)
        // A range of one number of tokens would be empty.
        .build_cartesian_2d((low * 0.9..high * 1.1).log_scale().base(2.0), 0.0..top)?;
    chart
        .configure_mesh()
        .x_desc("tokens per call (log scale)")
        .y_desc("time / floor")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .light_line_style(WHITE)
        .draw()?;
    chart.draw_series(LineSeries::new([(low * 0.9, 1.0), (high * 1.1, 1.0)], BLACK.mix(0.5)))?;
    let mut lines: Vec<_> = rows.iter().map(|r| (r.preset, r.scheme)).collect();
    lines.dedup();
    for ((preset, scheme), colour) in lines.into_iter().zip(COLOURS.into_iter().cycle()) {
        let mut points: Vec<_> = rows.iter().filter(|r| (r.preset, r.scheme) == (preset, scheme)).map(point).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)).point_size(3))?
            .label(if one { scheme.to_owned() } else { format!("{preset} {scheme}") })
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.4))
        .draw()?;
    root.present()?;
    Ok(())
}

fn point(row: &Row) -> (f64, f64) {
    (row.tokens as f64, row.ratio)
}
