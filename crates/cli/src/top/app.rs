//! What is shown, and what keys do. No terminal here.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use gnttab_host::control::Table;
use gnttab_host::monitor::{DomainInfo, MachineInfo};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use crate::args::Sort;
use crate::findings::{self, Finding};
use crate::pulse::{Beat, Pulse, mappings};

/// The columns to sort by, as `<` and `>` go through them.
const SORTS: [Sort; 9] = [
    Sort::Id,
    Sort::Name,
    Sort::Frames,
    Sort::Granted,
    Sort::Used,
    Sort::Maptrack,
    Sort::Operations,
    Sort::Errors,
    Sort::Age,
];

/// The shortest and the longest time between looks that keys can choose.
const INTERVALS: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(60));

/// What is to be done after a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// Draw.
    Draw,
    /// Look at the machine, then draw.
    Look,
    /// Leave.
    Leave,
}

/// What the person looks at.
#[derive(Debug)]
pub(super) enum Screen {
    /// Every domain.
    Domains,
    /// One domain, with its entries.
    Domain(u16),
    /// Which keys there are.
    Help,
}

/// See the module.
#[derive(Debug)]
pub(super) struct App {
    pub(super) machine: Option<MachineInfo>,
    pub(super) pulse: Pulse,
    pub(super) findings: Vec<Finding>,
    /// The last look was not answered: what is shown was seen before.
    pub(super) is_stale: bool,
    pub(super) screen: Screen,
    pub(super) table: Option<Table>,
    pub(super) sort: Sort,
    pub(super) reverse: bool,
    pub(super) filter: String,
    /// The filter is being typed.
    pub(super) typing: bool,
    /// The domain under the cursor.
    pub(super) selected: Option<u16>,
    /// The first line of the domain's pane that is shown.
    pub(super) scroll: usize,
    /// Lines that the pane has room for, as it was drawn last.
    pub(super) page: usize,
    pub(super) colour: bool,
    interval: Duration,
    paused: bool,
}

impl App {
    pub(super) fn new(interval: Duration, sort: Sort, filter: &str, colour: bool) -> App {
        App {
            machine: None,
            pulse: Pulse::default(),
            findings: Vec::new(),
            is_stale: false,
            screen: Screen::Domains,
            table: None,
            sort,
            reverse: false,
            filter: filter.to_owned(),
            typing: false,
            selected: None,
            scroll: 0,
            page: 10,
            colour,
            interval,
            paused: false,
        }
    }

    pub(super) fn interval(&self) -> Duration {
        self.interval
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused
    }

    /// The domain whose pane is open.
    pub(super) fn opened(&self) -> Option<u16> {
        match self.screen {
            Screen::Domain(id) => Some(id),
            Screen::Domains | Screen::Help => None,
        }
    }

    /// Takes in what was seen.
    pub(super) fn take(&mut self, now: Instant, machine: MachineInfo, domains: Vec<DomainInfo>) {
        self.machine = Some(machine);
        self.pulse.take(now, domains);
        self.findings = findings::judge(&self.pulse);
        let rows: Vec<u16> = self.rows().iter().map(|beat| beat.info.id).collect();
        if !self.selected.is_some_and(|id| rows.contains(&id)) {
            self.selected = rows.first().copied();
        }
    }

    pub(super) fn open_table(&mut self, table: Option<Table>) {
        self.table = table;
    }

    /// The domains that are shown, in order.
    pub(super) fn rows(&self) -> Vec<&Beat> {
        let wanted = self.filter.to_lowercase();
        let shown = |beat: &&Beat| {
            let name = format!("d{} {}", beat.info.id, beat.info.name).to_lowercase();
            name.contains(&wanted)
        };
        let mut rows: Vec<&Beat> = self.pulse.domains().filter(shown).collect();
        rows.sort_by(|one, other| self.order(one, other));
        rows
    }

    /// Numbers and names from the first, everything else from the most; `reverse` turns it round.
    fn order(&self, one: &Beat, other: &Beat) -> Ordering {
        let most = |key: fn(&DomainInfo) -> u64| key(&other.info).cmp(&key(&one.info));
        let fastest =
            |one: Option<f64>, other: Option<f64>| other.unwrap_or(0.0).total_cmp(&one.unwrap_or(0.0));
        let order = match self.sort {
            Sort::Id => one.info.id.cmp(&other.info.id),
            Sort::Name => one.info.name.cmp(&other.info.name),
            Sort::Frames => most(|info| info.grant_frames.0.into()),
            Sort::Granted => most(|info| info.granted.into()),
            Sort::Used => most(|info| info.in_use.into()),
            Sort::Maptrack => most(mappings),
            Sort::Operations => fastest(one.operations, other.operations),
            Sort::Errors => fastest(one.errors, other.errors),
            Sort::Age => most(|info| info.oldest_mapping_ms.unwrap_or(0)),
        };
        let order = if self.reverse { order.reverse() } else { order };
        order.then(one.info.id.cmp(&other.info.id))
    }

    /// What a key does.
    pub(super) fn key(&mut self, key: KeyEvent) -> Then {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c') => Then::Leave,
                KeyCode::Char('l') => Then::Look,
                _ => Then::Draw,
            };
        }
        if self.typing {
            return self.type_filter(key.code);
        }
        match (&self.screen, key.code) {
            (_, KeyCode::Char('q') | KeyCode::F(10)) if !matches!(self.screen, Screen::Help) => Then::Leave,
            (Screen::Help, _) => {
                self.screen = Screen::Domains;
                Then::Draw
            }
            (_, KeyCode::Char('?' | 'h') | KeyCode::F(1)) => {
                self.screen = Screen::Help;
                Then::Draw
            }
            (_, KeyCode::Char(' ')) => Then::Look,
            (_, KeyCode::Char('p')) => {
                self.paused = !self.paused;
                Then::Look
            }
            (_, KeyCode::Char('+')) => self.pace(self.interval * 2),
            (_, KeyCode::Char('-')) => self.pace(self.interval / 2),
            (Screen::Domains, code) => self.key_in_list(code),
            (Screen::Domain(_), code) => self.key_in_pane(code),
        }
    }

    fn pace(&mut self, interval: Duration) -> Then {
        self.interval = interval.clamp(INTERVALS.0, INTERVALS.1);
        Then::Look
    }

    fn type_filter(&mut self, code: KeyCode) -> Then {
        match code {
            KeyCode::Enter => self.typing = false,
            KeyCode::Esc => {
                self.typing = false;
                self.filter.clear();
            }
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Char(letter) if self.filter.chars().count() < 32 => self.filter.push(letter),
            _ => {}
        }
        self.keep_selection();
        Then::Draw
    }

    /// The cursor stays on a row that is shown.
    fn keep_selection(&mut self) {
        let rows: Vec<u16> = self.rows().iter().map(|beat| beat.info.id).collect();
        if !self.selected.is_some_and(|id| rows.contains(&id)) {
            self.selected = rows.first().copied();
        }
    }

    fn key_in_list(&mut self, code: KeyCode) -> Then {
        let page = isize::try_from(self.page).unwrap_or(isize::MAX);
        match code {
            KeyCode::Up | KeyCode::Char('k') => self.step(-1),
            KeyCode::Down | KeyCode::Char('j') => self.step(1),
            KeyCode::PageUp => self.step(-page),
            KeyCode::PageDown => self.step(page),
            KeyCode::Home | KeyCode::Char('g') => self.step(isize::MIN),
            KeyCode::End | KeyCode::Char('G') => self.step(isize::MAX),
            KeyCode::Char('/' | '\\') | KeyCode::F(3 | 4) => self.typing = true,
            KeyCode::Esc => {
                self.filter.clear();
                self.keep_selection();
            }
            KeyCode::Char('s' | '>' | '.') | KeyCode::F(6) => self.sort_by(1),
            KeyCode::Char('<' | ',') => self.sort_by(SORTS.len() - 1),
            KeyCode::Char('R' | 'I' | 'r') => self.reverse = !self.reverse,
            KeyCode::Char('N') => self.sort = Sort::Id,
            KeyCode::Char('P') => self.sort = Sort::Operations,
            KeyCode::Char('E') => self.sort = Sort::Errors,
            KeyCode::Char('M') => self.sort = Sort::Frames,
            KeyCode::Char('T') => self.sort = Sort::Age,
            KeyCode::Enter | KeyCode::Right => {
                if let Some(id) = self.selected {
                    (self.screen, self.table, self.scroll) = (Screen::Domain(id), None, 0);
                    return Then::Look;
                }
            }
            _ => {}
        }
        Then::Draw
    }

    fn key_in_pane(&mut self, code: KeyCode) -> Then {
        let page = self.page.saturating_sub(1).max(1);
        match code {
            KeyCode::Esc | KeyCode::Left | KeyCode::Backspace | KeyCode::Enter => {
                self.screen = Screen::Domains;
            }
            KeyCode::Up | KeyCode::Char('k') => self.scroll = self.scroll.saturating_sub(1),
            // The drawing knows where the end is.
            KeyCode::Down | KeyCode::Char('j') => self.scroll = self.scroll.saturating_add(1),
            KeyCode::PageUp => self.scroll = self.scroll.saturating_sub(page),
            KeyCode::PageDown => self.scroll = self.scroll.saturating_add(page),
            KeyCode::Home | KeyCode::Char('g') => self.scroll = 0,
            KeyCode::End | KeyCode::Char('G') => self.scroll = usize::MAX,
            _ => {}
        }
        Then::Draw
    }

    fn step(&mut self, by: isize) {
        let rows: Vec<u16> = self.rows().iter().map(|beat| beat.info.id).collect();
        let at = rows.iter().position(|id| Some(*id) == self.selected).unwrap_or(0);
        let at = at.saturating_add_signed(by).min(rows.len().saturating_sub(1));
        self.selected = rows.get(at).copied();
    }

    fn sort_by(&mut self, further: usize) {
        let at = SORTS.iter().position(|sort| *sort == self.sort).unwrap_or(0);
        self.sort = SORTS[(at + further) % SORTS.len()];
    }
}
