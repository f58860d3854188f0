//! What is shown, on a screen of any size: whole at 80 × 24, more of it on a larger one.

use std::collections::BTreeMap;

use gnttab_host::control::Table;
use gnttab_host::monitor::{DomainInfo, GrantInfo, MappingInfo, State};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Clear, Paragraph, Row, Table as Grid, TableState};

use super::app::{App, Screen};
use crate::args::Sort;
use crate::findings::{Level, age, references};
use crate::output::count;
use crate::pulse::{Beat, mappings, pins};

/// Warnings that are shown below the domains.
const WARNINGS: usize = 6;
/// From this width on there are columns for each kind of entry.
const WIDE: u16 = 113;
/// Looks that the history shows.
const BARS: usize = 8;

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, app: &mut App) {
    let [top, middle, bottom] =
        Layout::vertical([Constraint::Length(2), Constraint::Min(3), Constraint::Length(1)])
            .areas(frame.area());
    frame.render_widget(Paragraph::new(head(app)), top);
    match app.screen {
        Screen::Domains => domains(frame, app, middle),
        Screen::Domain(id) => pane(frame, app, id, middle),
        Screen::Help => {
            domains(frame, app, middle);
            help(frame, frame.area());
        }
    }
    frame.render_widget(Paragraph::new(foot(app)), bottom);
}

fn colour(app: &App, colour: Color) -> Style {
    if app.colour {
        Style::new().fg(colour)
    } else {
        Style::new().add_modifier(Modifier::BOLD)
    }
}

fn head(app: &App) -> Vec<Line<'static>> {
    let Some(machine) = &app.machine else {
        return vec![Line::raw("looking")];
    };
    let (mut operations, mut errors) = (0.0, 0.0);
    for beat in app.pulse.domains() {
        operations += beat.operations.unwrap_or(0.0);
        errors += beat.errors.unwrap_or(0.0);
    }
    let domains = app.pulse.domains().count();
    let pause = if app.is_paused() {
        "paused".to_owned()
    } else {
        format!("every {} s", app.interval().as_secs_f64())
    };
    let rates = format!(
        "   {} operations/s, {} errors/s",
        rate(Some(operations)),
        rate(Some(errors))
    );
    let (problems, warnings): (Vec<_>, Vec<_>) = app
        .findings
        .iter()
        .partition(|finding| finding.level == Level::Problem);
    let wrong = match (problems.len(), warnings.len()) {
        (0, 0) => Span::styled("nothing wrong", colour(app, Color::Green)),
        (0, some) => Span::styled(count(some, "warning"), colour(app, Color::Yellow)),
        (some, others) => Span::styled(
            format!("{}, {}", count(some, "problem"), count(others, "warning")),
            colour(app, Color::Red),
        ),
    };
    let first = Line::from(vec![
        Span::styled("gnttab top", Style::new().add_modifier(Modifier::BOLD)),
        Span::raw(format!(
            "  up {}, {}, {} vCPUs, {pause}   ",
            age(machine.age_ms),
            count(domains, "domain"),
            machine.vcpus.0
        )),
        wrong,
    ]);
    let second = if app.is_stale {
        let words = "The machine does not answer, it is busy or stopped: this is what was seen last.";
        Line::styled(words, colour(app, Color::Red))
    } else {
        Line::raw(format!(
            "{} shareable pages, {} references on them{rates}",
            short(machine.holds.shareable_pages),
            short(machine.holds.page_references)
        ))
    };
    vec![first, second]
}

fn foot(app: &App) -> Line<'static> {
    if app.typing {
        return Line::raw(format!(
            "Only domains with: {}_   Enter keeps it, Esc takes it away",
            app.filter
        ));
    }
    let bold = Style::new().add_modifier(Modifier::REVERSED);
    let keys: &[(&str, &str)] = match app.screen {
        Screen::Domains => &[
            ("?", "help"),
            ("Enter", "domain"),
            ("/", "filter"),
            ("s", "sort"),
            ("R", "reverse"),
            ("p", "pause"),
            ("+-", "pace"),
            ("q", "leave"),
        ],
        Screen::Domain(_) => &[
            ("?", "help"),
            ("Esc", "back"),
            ("↑↓", "scroll"),
            ("p", "pause"),
            ("q", "leave"),
        ],
        Screen::Help => &[("any key", "back")],
    };
    let mut spans = Vec::new();
    if !app.filter.is_empty() {
        spans.push(Span::raw(format!("only: {}  ", app.filter)));
    }
    for (key, what) in keys {
        spans.push(Span::styled(format!(" {key} "), bold));
        spans.push(Span::raw(format!("{what} ")));
    }
    Line::from(spans)
}

/// A column: its title, what it sorts by, its width, whether it is aligned right, and what it shows.
struct Column {
    title: &'static str,
    sort: Option<Sort>,
    width: u16,
    right: bool,
    show: fn(&Beat) -> String,
}

fn column(title: &'static str, sort: Option<Sort>, width: u16, show: fn(&Beat) -> String) -> Column {
    Column {
        title,
        sort,
        width,
        right: true,
        show,
    }
}

fn columns(width: u16) -> Vec<Column> {
    let left = |mut column: Column| {
        column.right = false;
        column
    };
    // The others take 105 columns then.
    let name = if width >= WIDE { (width - 105).min(20) } else { 8 };
    let mut columns = vec![
        column("ID", Some(Sort::Id), 4, |beat| format!("d{}", beat.info.id)),
        left(column("NAME", Some(Sort::Name), name, |beat| {
            beat.info.name.clone()
        })),
        left(column("S", None, 1, |beat| letter(&beat.info))),
        column("FRAMES", Some(Sort::Frames), 7, |beat| frames(&beat.info)),
        column("GRANT", Some(Sort::Granted), 5, |beat| {
            short(beat.info.granted.into())
        }),
    ];
    if width >= WIDE {
        columns.extend([
            column("PAGE", None, 5, |beat| {
                short(beat.info.entries.permit_access.into())
            }),
            column("PART", None, 5, |beat| short(beat.info.entries.sub_page.into())),
            column("XFER", None, 5, |beat| {
                short(beat.info.entries.accept_transfer.into())
            }),
            column("TRANS", None, 5, |beat| {
                short(beat.info.entries.transitive.into())
            }),
            column("GONE", None, 5, |beat| short(beat.info.entries.withdrawn.into())),
        ]);
    }
    columns.extend([
        column("USED", Some(Sort::Used), 5, |beat| short(beat.info.in_use.into())),
        column("PINS", None, 5, |beat| short(pins(&beat.info))),
        column("MAPTRACK", Some(Sort::Maptrack), 9, |beat| maptrack(&beat.info)),
        column("OPS/s", Some(Sort::Operations), 6, |beat| rate(beat.operations)),
        column("ERR/s", Some(Sort::Errors), 6, |beat| rate(beat.errors)),
        left(column("HISTORY", None, 8, history)),
    ]);
    columns.push(column(
        "OLD",
        Some(Sort::Age),
        if width >= WIDE { 8 } else { 5 },
        |beat| beat.info.oldest_mapping_ms.map_or("-".to_owned(), brief_age),
    ));
    // Numbers are shown whole or not at all.
    let mut room = width;
    let fits = columns.iter().take_while(|column| {
        let had = room;
        room = room.saturating_sub(column.width + 1);
        had >= column.width
    });
    let fits = fits.count();
    columns.truncate(fits);
    columns
}

fn domains(frame: &mut Frame<'_>, app: &mut App, area: Rect) {
    let shown = app.findings.len().min(WARNINGS);
    let below = if shown == 0 {
        0
    } else {
        u16::try_from(shown + 1).unwrap_or(0)
    };
    let [list, warnings] = Layout::vertical([Constraint::Min(3), Constraint::Length(below)]).areas(area);
    app.page = usize::from(list.height.saturating_sub(1)).max(1);
    let columns = columns(area.width);
    let reversed = Style::new().add_modifier(Modifier::REVERSED);
    let align = |column: &Column, text: String| {
        let line = Line::raw(text);
        Cell::from(if column.right { line.right_aligned() } else { line })
    };
    let titles = columns.iter().map(|column| {
        let cell = align(column, column.title.to_owned());
        if column.sort == Some(app.sort) {
            cell.style(Style::new().add_modifier(Modifier::REVERSED | Modifier::BOLD | Modifier::UNDERLINED))
        } else {
            cell
        }
    });
    let header = Row::new(titles).style(reversed);
    let rows = app.rows();
    let selected = rows.iter().position(|beat| Some(beat.info.id) == app.selected);
    let worst = |beat: &Beat| {
        app.findings
            .iter()
            .filter(|finding| finding.domain == beat.info.id)
            .map(|finding| finding.level)
            .min()
    };
    let lines = rows.iter().map(|beat| {
        let style = match worst(beat) {
            Some(Level::Problem) => colour(app, Color::Red),
            Some(Level::Warning) => colour(app, Color::Yellow),
            None => Style::new(),
        };
        Row::new(columns.iter().map(|column| align(column, (column.show)(beat)))).style(style)
    });
    let widths = columns.iter().map(|column| Constraint::Length(column.width));
    let grid = Grid::new(lines, widths)
        .header(header)
        .row_highlight_style(reversed)
        .column_spacing(1);
    let mut state = TableState::new().with_selected(selected);
    frame.render_stateful_widget(grid, list, &mut state);

    let mut lines = vec![Line::styled(
        "What is wrong",
        Style::new().add_modifier(Modifier::BOLD),
    )];
    for finding in app.findings.iter().take(shown) {
        let style = match finding.level {
            Level::Problem => colour(app, Color::Red),
            Level::Warning => colour(app, Color::Yellow),
        };
        lines.push(Line::from(vec![
            Span::styled(format!("{:11} ", finding.kind.name()), style),
            Span::raw(format!("{}: {}", app.pulse.name(finding.domain), finding.what)),
        ]));
    }
    if let (true, Some(last)) = (app.findings.len() > shown, lines.last_mut()) {
        *last = Line::raw(format!(
            "and {} more: gnttab doctor",
            app.findings.len() + 1 - shown
        ));
    }
    frame.render_widget(Paragraph::new(lines), warnings);
}

fn pane(frame: &mut Frame<'_>, app: &mut App, id: u16, area: Rect) {
    let block = Block::bordered().title(format!(" {} ", app.pulse.name(id)));
    let inside = block.inner(area);
    frame.render_widget(block, area);
    let Some(beat) = app.pulse.domain(id) else {
        frame.render_widget(Paragraph::new("It has ended."), inside);
        return;
    };
    let head = pane_head(beat, app);
    let table = app.table.as_ref().map(|table| Entries::new(table, app));
    let count = head.len() + table.as_ref().map_or(0, Entries::count);
    let room = usize::from(inside.height);
    let scroll = app.scroll.min(count.saturating_sub(room));
    // A table may have half a million entries: only what is seen becomes text.
    let line = |at: usize| match (head.get(at), &table) {
        (Some(line), _) => line.clone(),
        (None, Some(table)) => table.line(at - head.len()),
        (None, None) => Line::default(),
    };
    let shown: Vec<Line<'_>> = (scroll..count).take(room).map(line).collect();
    frame.render_widget(Paragraph::new(shown), inside);
    (app.scroll, app.page) = (scroll, room.max(1));
}

fn pane_head(beat: &Beat, app: &App) -> Vec<Line<'static>> {
    let info = &beat.info;
    let entries = &info.entries;
    let (taken, most) = references(info);
    let mut lines = vec![
        Line::raw(format!(
            "{}, process {}, up {}, {}",
            state(info),
            info.pid.map_or("-".to_owned(), |pid| pid.to_string()),
            age(info.age_ms),
            if info.isolated { "isolated" } else { "not isolated" }
        )),
        Line::raw(format!(
            "table: version {}, {} frames, {taken} of {most} references taken",
            info.version,
            frames(info)
        )),
        Line::raw(format!(
            "entries: {} pages, {} parts, {} for transfer, {} transitive, {} withdrawn in use",
            entries.permit_access,
            entries.sub_page,
            entries.accept_transfer,
            entries.transitive,
            entries.withdrawn
        )),
        Line::raw(format!(
            "in use: {} entries, {} pins{}",
            info.in_use,
            pins(info),
            by_peer(
                ", by",
                info.pinned_by.iter().map(|(id, count)| (*id, *count)),
                app
            )
        )),
        Line::raw(format!(
            "maps: {} of {} handles{}, oldest {}",
            mappings(info),
            info.handles.1,
            by_peer(", of", info.maps.iter().map(|(id, count)| (*id, *count)), app),
            info.oldest_mapping_ms.map_or("-".to_owned(), age)
        )),
        Line::raw(format!(
            "rate: {} operations/s, {} errors/s  {}",
            rate(beat.operations),
            rate(beat.errors),
            bars(beat, 30)
        )),
    ];
    for finding in app.findings.iter().filter(|finding| finding.domain == info.id) {
        lines.push(Line::from(vec![
            Span::styled(format!("{}: ", finding.kind.name()), colour(app, Color::Red)),
            Span::raw(finding.what.clone()),
        ]));
    }
    if let Some(says) = &info.says {
        let named = says.consumers.iter().filter(|consumer| !consumer.name.is_empty());
        for (number, consumer) in named.enumerate() {
            if number == 0 {
                lines.push(title("Consumers, as it says"));
            }
            lines.push(Line::raw(format!(
                "  {:16} {} of {} references, refused {} times",
                consumer.name,
                consumer.used,
                consumer.quota.map_or("all".to_owned(), |quota| quota.to_string()),
                consumer.refused
            )));
        }
    }
    lines
}

fn title(text: &str) -> Line<'static> {
    Line::styled(text.to_owned(), Style::new().add_modifier(Modifier::BOLD))
}

/// A domain's entries and mappings, as lines: each under a title, where there are any.
struct Entries<'a> {
    table: &'a Table,
    app: &'a App,
    /// Who maps an entry, and for how long at most.
    mapped_by: BTreeMap<u32, BTreeMap<u16, u64>>,
}

impl<'a> Entries<'a> {
    fn new(table: &'a Table, app: &'a App) -> Self {
        let mut mapped_by: BTreeMap<u32, BTreeMap<u16, u64>> = BTreeMap::new();
        for mapped in &table.mapped_by {
            let of_one = mapped_by.entry(mapped.mapping.gref).or_default();
            let age = of_one.entry(mapped.domain).or_default();
            *age = mapped.mapping.age_ms.max(*age);
        }
        Entries {
            table,
            app,
            mapped_by,
        }
    }

    fn count(&self) -> usize {
        let titled = |count: usize| if count == 0 { 0 } else { count + 1 };
        titled(self.table.grants.len()) + titled(self.table.mappings.len())
    }

    fn line(&self, at: usize) -> Line<'static> {
        let grants = &self.table.grants;
        match at.checked_sub(usize::from(!grants.is_empty())) {
            None => title("       REF KIND            TO               FRAME PINS MAPPED BY"),
            Some(at) if at < grants.len() => Line::raw(self.grant(&grants[at])),
            Some(at) => match (at - grants.len()).checked_sub(1) {
                None => title("    HANDLE MAPS OF            REF ACCESS FOR"),
                Some(at) => self
                    .table
                    .mappings
                    .get(at)
                    .map_or_else(Line::default, |mapping| Line::raw(self.mapping(mapping))),
            },
        }
    }

    fn grant(&self, grant: &GrantInfo) -> String {
        let by = self.mapped_by.get(&grant.gref).map_or("-".to_owned(), |by| {
            let by = by
                .iter()
                .map(|(domain, ms)| format!("{} for {}", self.app.pulse.name(*domain), age(*ms)));
            by.collect::<Vec<_>>().join(", ")
        });
        let pins: u32 = grant.pins.iter().copied().map(u32::from).sum();
        format!(
            "{:>#10x} {:15} {:12} {:>#9x} {pins:4} {by}",
            grant.gref,
            grant.kind,
            self.app.pulse.name(grant.grantee),
            grant.frame
        )
    }

    fn mapping(&self, mapping: &MappingInfo) -> String {
        format!(
            "{:>#10x}      {:12} {:>#9x} {:6} {}",
            mapping.handle,
            self.app.pulse.name(mapping.granter),
            mapping.gref,
            if mapping.readonly { "read" } else { "write" },
            age(mapping.age_ms)
        )
    }
}

fn by_peer(how: &str, counts: impl Iterator<Item = (u16, u32)>, app: &App) -> String {
    let all: Vec<String> = counts
        .map(|(id, count)| format!("{} {count}", app.pulse.name(id)))
        .collect();
    if all.is_empty() {
        String::new()
    } else {
        format!("{how} {}", all.join(", "))
    }
}

const HELP: &str = "\
 ? h F1          this           q F10 Ctrl-C    leave
 arrows j k      move           Enter →         the domain's entries
 PgUp PgDn       page           Esc ←           back, no filter
 Home End g G    first, last    / \\ F3 F4       only domains with a text
 s > F6  <       next, previous column to sort by
 N P E M T       by number, operations, errors, frames, age
 R I r           the other way round
 + -             slower, faster     p  pause     Space  look now

 S: Running, Starting, Dying. FRAMES and MAPTRACK: used/allowed.
 GRANT: entries granted (PAGE, PART, XFER, TRANSitive, GONE:
 withdrawn and still used). USED: entries that others use.
 OLD: the age of its oldest mapping of another's page.";

fn help(frame: &mut Frame<'_>, area: Rect) {
    let lines = u16::try_from(HELP.lines().count()).unwrap_or(20);
    let (width, height) = (76.min(area.width), (lines + 2).min(area.height));
    let place = Rect {
        x: (area.width - width) / 2,
        y: (area.height - height) / 2,
        width,
        height,
    };
    frame.render_widget(Clear, place);
    frame.render_widget(
        Paragraph::new(HELP).block(Block::bordered().title(" keys ")),
        place,
    );
}

/// `running`, `stopped`, `starting`, `dying`.
pub(super) fn state(info: &DomainInfo) -> &'static str {
    match info.state {
        State::Running if info.stopped => "stopped",
        State::Starting => "starting",
        State::Running => "running",
        State::Dying => "dying",
    }
}

/// The state's first letter; `T` for one that is stopped, as `ps` has it.
fn letter(info: &DomainInfo) -> String {
    if info.stopped {
        return "T".to_owned();
    }
    state(info)[..1].to_uppercase()
}

/// Frames used of allowed.
pub(super) fn frames(info: &DomainInfo) -> String {
    format!(
        "{}/{}",
        short(info.grant_frames.0.into()),
        short(info.grant_frames.1.into())
    )
}

/// Mappings held of allowed.
pub(super) fn maptrack(info: &DomainInfo) -> String {
    format!("{}/{}", short(mappings(info)), short(info.handles.1))
}

/// Something a second.
pub(super) fn rate(rate: Option<f64>) -> String {
    match rate {
        None => "-".to_owned(),
        Some(rate) if rate > 0.0 && rate < 9.95 => format!("{rate:.1}"),
        Some(rate) => {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "float casts saturate, which is right"
            )]
            let whole = rate.round() as u64;
            short(whole)
        }
    }
}

/// A count in five characters at most: `9999`, `262k`, `12M`.
pub(super) fn short(count: u64) -> String {
    match count {
        0..10_000 => count.to_string(),
        10_000..1_000_000 => format!("{}k", count / 1000),
        1_000_000..1_000_000_000 => format!("{}M", count / 1_000_000),
        _ => format!("{}G", count / 1_000_000_000),
    }
}

/// An age in five characters at most.
fn brief_age(ms: u64) -> String {
    match ms / 1000 {
        seconds @ 0..60 => format!("{seconds}s"),
        seconds @ 60..6000 => format!("{}:{:02}", seconds / 60, seconds % 60),
        seconds @ 6000..360_000 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

fn history(beat: &Beat) -> String {
    bars(beat, BARS)
}

/// Operations a second at the last looks, each as a bar against the highest of them.
fn bars(beat: &Beat, count: usize) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let skip = beat.history.len().saturating_sub(count);
    let last: Vec<f64> = beat.history.iter().skip(skip).copied().collect();
    let most = last.iter().copied().fold(0.0, f64::max);
    last.iter()
        .map(|rate| {
            let eighth = (1..BARS.len()).take_while(|eighth| *rate > most * *eighth as f64 / 8.0);
            if *rate <= 0.0 { ' ' } else { BARS[eighth.count()] }
        })
        .collect()
}
