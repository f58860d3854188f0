//! What is drawn, and what keys do, on a screen in memory.

use std::time::{Duration, Instant};

use gnttab_host::control::Table;
use gnttab_host::monitor::{DomainInfo, MachineInfo};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use serde_json::json;

use super::app::{App, Then};
use super::draw::draw;
use crate::args::Sort;
use crate::pulse::tests::domain;

fn machine() -> MachineInfo {
    serde_json::from_value(json!({
        "program": "0", "pid": 1, "age_ms": 65_000, "vcpus": [3, 255],
        "holds": { "running": 3, "dying": 0, "memories": 3, "shareable_pages": 12, "page_references": 2, "descriptors": 50 },
    }))
    .unwrap()
}

fn looks() -> [Vec<DomainInfo>; 2] {
    let app = |maps: u64| {
        json!({ "operations": { "copy": maps }, "statuses": { "okay": maps }, "maps": { "2": 3 },
        "oldest_mapping_ms": 62_000 })
    };
    let storage = json!({ "says": { "age_ms": 1, "refs": [512, 500], "leaked": 0, "consumers": [
        { "name": "vbd0", "used": 4, "quota": 64, "refused": 0 }], "pending_total": 1,
        "pending": [{ "gref": 8, "peer": 1, "tries": 3, "age_ms": 5000 }] },
        "granted": 4, "in_use": 1, "pinned_by": { "1": 3 } });
    let bad = |bad: u64| json!({ "operations": { "map_grant_ref": bad }, "statuses": { "bad_gntref": bad } });
    [(0, 0), (250, 2000)].map(|(copies, refused)| {
        vec![
            domain(1, "app", app(copies)),
            domain(2, "storage", storage.clone()),
            domain(3, "knocker", bad(refused)),
        ]
    })
}

fn app() -> App {
    let mut app = App::new(Duration::from_secs(1), Sort::Id, "", false);
    let now = Instant::now();
    for (second, look) in (0..).zip(looks()) {
        app.take(now + Duration::from_secs(second), machine(), look);
    }
    app
}

fn screen(app: &mut App, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, app)).unwrap();
    let buffer = terminal.backend().buffer();
    (0..height)
        .map(|y| {
            let line: String = (0..width).map(|x| buffer[(x, y)].symbol()).collect();
            line.trim_end().to_owned()
        })
        .collect()
}

fn press(app: &mut App, code: KeyCode) -> Then {
    app.key(KeyEvent::new(code, KeyModifiers::NONE))
}

fn typed(app: &mut App, text: &str) {
    for letter in text.chars() {
        press(app, KeyCode::Char(letter));
    }
}

#[test]
fn a_screen_of_80_by_24_shows_everything() {
    let screen = screen(&mut app(), 80, 24);
    assert_eq!(
        screen[0],
        "gnttab top  up 1:05, 3 domains, 3 vCPUs, every 1 s   2 problems, 0 warnings"
    );
    assert_eq!(
        screen[1],
        "12 shareable pages, 2 references on them   2250 operations/s, 2000 errors/s"
    );
    assert_eq!(
        screen[2],
        "  ID NAME     S  FRAMES GRANT  USED  PINS  MAPTRACK  OPS/s  ERR/s HISTORY    OLD"
    );
    assert_eq!(
        screen[3],
        "  d1 app      R    1/64     0     0     0    3/262k    250      0 █         1:02"
    );
    assert_eq!(
        screen[4],
        "  d2 storage  R    1/64     4     1     3    0/262k      0      0              -"
    );
    let wrong = screen.iter().position(|line| line == "What is wrong").unwrap();
    assert_eq!(
        screen[wrong + 1],
        "stuck       d2 storage: wants reference 0x8 back; d1 app has kept it for 5.0 s"
    );
    assert_eq!(
        screen[wrong + 2],
        "refused     d3 knocker: is refused 2000 times a second, mostly bad_gntref"
    );
    assert!(screen[23].ends_with("  +- pace  q leave"), "{}", screen[23]);
}

#[test]
fn a_wide_screen_has_the_kinds_of_entries_and_a_small_one_does_not_fail() {
    let wide = screen(&mut app(), 140, 40);
    assert!(wide[2].contains("PAGE  PART  XFER TRANS  GONE"), "{}", wide[2]);
    for width in [80, 113, 120, 300] {
        let lines = screen(&mut app(), width, 24);
        assert!(lines[2].ends_with("OLD"), "{width}: {}", lines[2]);
    }
    let narrow = screen(&mut app(), 40, 12);
    assert_eq!(narrow[2], "  ID NAME     S  FRAMES GRANT  USED");
    assert_eq!(narrow[3], "  d1 app      R    1/64     0     0");
    assert_eq!(screen(&mut app(), 20, 5)[2], "  ID NAME     S");
    for (width, height) in [(1, 1), (20, 5), (79, 3), (300, 100)] {
        screen(&mut app(), width, height);
        let mut help = app();
        press(&mut help, KeyCode::Char('?'));
        screen(&mut help, width, height);
        let mut pane = app();
        press(&mut pane, KeyCode::Enter);
        screen(&mut pane, width, height);
    }
}

#[test]
fn a_machine_that_does_not_answer_is_said_above_what_was_seen_last() {
    let mut app = app();
    app.is_stale = true;
    let screen = screen(&mut app, 80, 24);
    assert!(
        screen[1].ends_with("this is what was seen last."),
        "{}",
        screen[1]
    );
    assert!(screen[3].contains("d1 app"), "{}", screen[3]);
}

#[test]
fn sorting_goes_by_the_column_and_can_be_turned_round() {
    let order = |app: &App| -> Vec<u16> { app.rows().iter().map(|beat| beat.info.id).collect() };
    let mut app = app();
    assert_eq!(order(&app), [1, 2, 3]);
    press(&mut app, KeyCode::Char('P'));
    assert_eq!(order(&app), [3, 1, 2]);
    press(&mut app, KeyCode::Char('E'));
    assert_eq!(order(&app), [3, 1, 2]);
    press(&mut app, KeyCode::Char('R'));
    assert_eq!(order(&app), [1, 2, 3]);
    press(&mut app, KeyCode::Char('R'));
    press(&mut app, KeyCode::Char('N'));
    press(&mut app, KeyCode::Char('>'));
    assert_eq!(app.sort, Sort::Name);
    assert_eq!(order(&app), [1, 3, 2]);
    press(&mut app, KeyCode::Char('<'));
    press(&mut app, KeyCode::Char('<'));
    assert_eq!(app.sort, Sort::Age);
    assert_eq!(order(&app)[0], 1);
}

#[test]
fn a_filter_is_typed_kept_and_taken_away_and_the_cursor_stays_on_what_is_shown() {
    let mut app = app();
    press(&mut app, KeyCode::End);
    assert_eq!(app.selected, Some(3));
    press(&mut app, KeyCode::Char('/'));
    typed(&mut app, "STORq");
    assert!(app.rows().is_empty(), "q is a letter here");
    press(&mut app, KeyCode::Backspace);
    press(&mut app, KeyCode::Enter);
    assert_eq!((app.rows().len(), app.selected), (1, Some(2)));
    let lines = screen(&mut app, 80, 24);
    assert!(lines[3].contains("storage") && !lines[4].contains("knocker"));
    press(&mut app, KeyCode::Esc);
    assert_eq!(app.rows().len(), 3);
}

#[test]
fn keys_leave_help_pause_and_pace_as_top_has_them() {
    let mut app = app();
    assert_eq!(press(&mut app, KeyCode::Char('q')), Then::Leave);
    assert_eq!(press(&mut app, KeyCode::F(10)), Then::Leave);
    assert_eq!(
        app.key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)),
        Then::Leave
    );
    press(&mut app, KeyCode::Char('?'));
    assert!(
        screen(&mut app, 80, 24)
            .iter()
            .any(|line| line.contains("next, previous column to sort by"))
    );
    assert_eq!(
        press(&mut app, KeyCode::Char('q')),
        Then::Draw,
        "any key goes back"
    );
    press(&mut app, KeyCode::Char('p'));
    assert!(app.is_paused());
    press(&mut app, KeyCode::Char('+'));
    assert_eq!(app.interval(), Duration::from_secs(2));
    for _ in 0..20 {
        press(&mut app, KeyCode::Char('-'));
    }
    assert_eq!(app.interval(), Duration::from_millis(250));
    // The cursor stops at the ends.
    press(&mut app, KeyCode::Up);
    assert_eq!(app.selected, Some(1));
    press(&mut app, KeyCode::PageDown);
    assert_eq!(app.selected, Some(3));
}

#[test]
fn a_domains_pane_shows_its_entries_and_who_maps_each_for_how_long() {
    let mut app = app();
    press(&mut app, KeyCode::Down);
    assert_eq!(press(&mut app, KeyCode::Enter), Then::Look);
    assert_eq!(app.opened(), Some(2));
    let info = app.pulse.domain(2).unwrap().info.clone();
    let grants: Vec<_> = (8..108)
        .map(|gref| {
            json!({ "gref": gref, "kind": "permit_access", "flags": "", "grantee": 1, "frame": 16, "user": 1,
                "pins": [1, 0, 0, 0] })
        })
        .collect();
    let mapped = |gref: u32, age: u64| json!({ "domain": 1, "handle": 0, "granter": 2, "gref": gref, "readonly": false, "age_ms": age });
    let table: Table = serde_json::from_value(json!({
        "domain": info, "grants": grants, "mappings": [], "mapped_by": [mapped(8, 3000), mapped(8, 61_000)],
    }))
    .unwrap();
    app.open_table(Some(table));
    let lines = screen(&mut app, 80, 24);
    let has = |words: &str| lines.iter().any(|line| line.contains(words));
    assert!(
        has("stuck: wants reference 0x8 back; d1 app has kept it for 5.0 s"),
        "{lines:#?}"
    );
    assert!(
        has("vbd0             4 of 64 references, refused 0 times"),
        "{lines:#?}"
    );
    assert!(
        has("0x8 permit_access   d1 app            0x10    1 d1 app for 1:01"),
        "{lines:#?}"
    );
    press(&mut app, KeyCode::End);
    let lines = screen(&mut app, 80, 24);
    assert!(
        lines.iter().any(|line| line.contains("0x6b permit_access")),
        "{lines:#?}"
    );
    press(&mut app, KeyCode::Esc);
    assert_eq!(app.opened(), None);
}
