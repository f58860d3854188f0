//! Plots of a run, as SVG: cost by batch, by size, by thread and by scale, in units of `L`.

use std::fmt::Write as _;

use crate::report::Report;
use crate::xen;

/// A file to be written.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Its name.
    pub file: &'static str,
    /// Its content.
    pub svg: String,
}

/// A line: what it is of, and a value at each place of the axis that has one.
struct Series {
    name: String,
    values: Vec<Option<f64>>,
    /// Somebody else's figures: drawn broken.
    foreign: bool,
}

struct Chart {
    title: &'static str,
    axis: &'static str,
    places: Vec<String>,
    series: Vec<Series>,
}

/// The plots that a run has the figures for.
#[must_use]
pub fn plots(report: &Report) -> Vec<Plot> {
    let all = [
        ("by-batch.svg", by_batch(report)),
        ("by-size.svg", by_size(report)),
        ("by-thread.svg", by_thread(report)),
        ("by-scale.svg", by_scale(report)),
    ];
    let drawn = all.into_iter().filter(|(_, chart)| {
        let mut own = chart.series.iter().filter(|series| !series.foreign);
        own.any(|series| series.values.iter().any(Option::is_some))
    });
    drawn
        .map(|(file, chart)| Plot {
            file,
            svg: chart.svg(),
        })
        .collect()
}

fn in_l(report: &Report, name: &str) -> Option<f64> {
    let found = report.figures.iter().find(|figure| figure.name == name);
    found.map(crate::Figure::in_l)
}

/// Ours and Xen's for the case that `case` names at each place.
fn both(report: &Report, places: &[&str], what: &str, case: impl Fn(&str) -> String) -> [Series; 2] {
    let names: Vec<String> = places.iter().map(|place| case(place)).collect();
    [
        Series {
            name: what.to_owned(),
            values: names.iter().map(|name| in_l(report, name)).collect(),
            foreign: false,
        },
        Series {
            name: format!("{what}, Xen"),
            values: names.iter().map(|name| xen::in_l(name)).collect(),
            foreign: true,
        },
    ]
}

fn owned(places: &[&str]) -> Vec<String> {
    places.iter().map(|&place| place.to_owned()).collect()
}

fn by_batch(report: &Report) -> Chart {
    let places = ["1", "8", "32", "128"];
    let mut series = Vec::new();
    for version in ["v1", "v2"] {
        series.extend(both(
            report,
            &places,
            &format!("map + unmap, {version}"),
            |batch| format!("pair/{version}/warm/b{batch}"),
        ));
        series.extend(both(
            report,
            &places,
            &format!("copy 64 bytes, {version}"),
            |batch| format!("copy-from-64/{version}/warm/b{batch}"),
        ));
    }
    Chart {
        title: "Cost by batch: an item, warm",
        axis: "items of a hypercall",
        places: owned(&places),
        series,
    }
}

fn by_size(report: &Report) -> Chart {
    let places = ["64", "512", "1500", "4096"];
    let mut series = Vec::new();
    for temperature in ["warm", "cold"] {
        let case = |size: &str| format!("copy-from-{size}/v1/{temperature}/b32");
        series.extend(both(report, &places, &format!("copy, {temperature}"), case));
        let limit = |size: &&str| {
            let name = case(size);
            let found = report.figures.iter().find(|figure| figure.name == name);
            found.map(|figure| figure.limit_ns / figure.l_ns)
        };
        series.push(Series {
            name: format!("memcpy, {temperature}"),
            values: places.iter().map(limit).collect(),
            foreign: true,
        });
    }
    Chart {
        title: "Cost by size: a copy, version 1, batch 32",
        axis: "bytes",
        places: owned(&places),
        series,
    }
}

fn by_thread(report: &Report) -> Chart {
    let places = [
        "one thread",
        "two, separate domains",
        "two, one granter",
        "two, one reference",
    ];
    let names = [
        "pair",
        "pair-2-separate",
        "pair-2-one-granter",
        "pair-2-one-reference",
    ];
    let mut series = Vec::new();
    for (version, batch) in [("v1", 1), ("v1", 32), ("v2", 32)] {
        let named: Vec<String> = names
            .iter()
            .map(|name| format!("{name}/{version}/warm/b{batch}"))
            .collect();
        let named: Vec<&str> = named.iter().map(String::as_str).collect();
        let what = format!("map + unmap, {version}, batch {batch}");
        series.extend(both(report, &named, &what, ToOwned::to_owned));
    }
    Chart {
        title: "Cost by thread: an item, for each thread",
        axis: "",
        places: owned(&places),
        series,
    }
}

fn by_scale(report: &Report) -> Chart {
    let places = ["1", "10", "100", "1000", "4000"];
    let line = |what: &str, name: &str| {
        let case = |place: &&str| in_l(report, &format!("scale/{what}/v1/{place}-domains"));
        Series {
            name: name.to_owned(),
            values: places.iter().map(case).collect(),
            foreign: false,
        }
    };
    Chart {
        title: "Cost by scale: map + unmap, batch 32, 250 live mappings a domain",
        axis: "domains, each with a table of 64 frames",
        places: owned(&places),
        series: vec![
            line("one-domain", "references of one domain"),
            line("all-domains", "every item another domain's, at random (cold)"),
        ],
    }
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 260.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 48.0;

/// Told apart by the colour-blind too (Okabe and Ito).
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

impl Chart {
    fn x(&self, place: usize) -> f64 {
        let step = (WIDTH - LEFT - RIGHT) / self.places.len() as f64;
        LEFT + step * (place as f64 + 0.5)
    }

    /// The decades that hold every value.
    fn decades(&self) -> (f64, f64) {
        let values = || {
            self.series
                .iter()
                .flat_map(|series| series.values.iter().flatten())
        };
        let low = values().copied().fold(f64::INFINITY, f64::min).max(1e-3);
        let high = values().copied().fold(low, f64::max);
        let (low, high) = (low.log10().floor(), high.log10().ceil());
        (low, high.max(low + 1.0))
    }

    fn svg(&self) -> String {
        let (low, high) = self.decades();
        let y = |value: f64| {
            let part = (value.max(1e-3).log10() - low) / (high - low);
            HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)
        };
        let mut out = String::new();
        // Writing to a string cannot fail.
        let mut put = |text: std::fmt::Arguments<'_>| {
            let _ = out.write_fmt(text);
            out.push('\n');
        };
        put(format_args!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">"##
        ));
        put(format_args!(
            r##"<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>"##
        ));
        put(format_args!(
            r##"<text x="{LEFT}" y="22" font-size="15" fill="#111111">{}</text>"##,
            self.title
        ));
        let end = WIDTH - RIGHT;
        let mut decade = low;
        while decade <= high {
            for part in [1.0, 2.0, 5.0] {
                let value = part * 10_f64.powf(decade);
                if value > 10_f64.powf(high) {
                    break;
                }
                let at = y(value);
                put(format_args!(
                    r##"<path d="M{LEFT} {at:.1}H{end}" stroke="#dddddd"/><text x="{:.1}" y="{:.1}" text-anchor="end" fill="#444444">{value}</text>"##,
                    LEFT - 6.0,
                    at + 4.0
                ));
            }
            decade += 1.0;
        }
        put(format_args!(
            r##"<text x="{LEFT}" y="{:.1}" fill="#444444">L: one uncontended locked compare-exchange</text>"##,
            TOP - 6.0
        ));
        for (place, name) in self.places.iter().enumerate() {
            put(format_args!(
                r##"<text x="{:.1}" y="{:.1}" text-anchor="middle" fill="#444444">{name}</text>"##,
                self.x(place),
                HEIGHT - BOTTOM + 18.0
            ));
        }
        put(format_args!(
            r##"<text x="{:.1}" y="{:.1}" text-anchor="middle" fill="#444444">{}</text>"##,
            f64::midpoint(LEFT, end),
            HEIGHT - BOTTOM + 36.0,
            self.axis
        ));
        let drawn = self
            .series
            .iter()
            .filter(|series| series.values.iter().any(Option::is_some));
        for (row, series) in drawn.enumerate() {
            let colour = COLOURS[row % COLOURS.len()];
            let points: Vec<(f64, f64)> = series
                .values
                .iter()
                .enumerate()
                .filter_map(|(place, value)| Some((self.x(place), y((*value)?))))
                .collect();
            let line: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let dash = if series.foreign {
                r##" stroke-dasharray="5 4""##
            } else {
                ""
            };
            put(format_args!(
                r##"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>"##,
                line.join(" ")
            ));
            let fill = if series.foreign { "#ffffff" } else { colour };
            for (x, y) in &points {
                put(format_args!(
                    r##"<circle cx="{x:.1}" cy="{y:.1}" r="4" fill="{fill}" stroke="{colour}" stroke-width="2"/>"##
                ));
            }
            let at = TOP + 16.0 * row as f64;
            put(format_args!(
                r##"<path d="M{:.1} {at:.1}h22" stroke="{colour}" stroke-width="2"{dash}/><text x="{:.1}" y="{:.1}" fill="#111111">{}</text>"##,
                end + 12.0,
                end + 40.0,
                at + 4.0,
                series.name
            ));
        }
        put(format_args!("</svg>"));
        out
    }
}

/// Xen's figures beside a run's, as a Markdown table.
#[must_use]
pub fn table(report: &Report) -> String {
    let mut out = String::from(
        "| work | Xen default | Xen plain | ours | Xen default, L | ours, L | times less |\n|---|---|---|---|---|---|---|\n",
    );
    for xen in xen::FIGURES {
        let Some(ours) = report.figures.iter().find(|figure| figure.name == xen.case) else {
            continue;
        };
        let plain = xen
            .plain_ns
            .map_or_else(|| "-".to_owned(), |ns| format!("{ns:.0}"));
        let _ = writeln!(
            out,
            "| {} | {:.1} | {plain} | {:.1} | {:.1} | {:.1} | {:.1} |",
            xen.work,
            xen.default_ns,
            ours.min_ns,
            xen.default_ns / xen::L_NS,
            ours.in_l(),
            xen.default_ns / xen::L_NS / ours.in_l()
        );
    }
    out
}
