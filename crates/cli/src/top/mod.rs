//! `gnttab top`: a running machine, looked at again and again.
//!
//! [`app`] knows what is shown and what keys do, [`draw`] puts it on a screen, [`batch`] prints it instead, and [`prometheus`]
//! prints or serves what is counted. What is shown is
//! what the control socket said last; between two looks nothing is asked.

mod app;
mod batch;
mod draw;
mod prometheus;
#[cfg(test)]
mod tests;

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use gnttab_host::control::Client;
use ratatui::crossterm::event::{self, Event, KeyEventKind};

use crate::args::Top;
use crate::control;
use crate::failure::Failure;
use crate::live::Stop;
use crate::output;
use app::{App, Then};

/// How long a signal may wait for somebody to look.
const LOOK: Duration = Duration::from_millis(100);

/// Draws, or prints, until the person has seen enough.
pub(crate) fn main(args: &Top) -> Result<(), Failure> {
    if args.prometheus {
        return prometheus::main(args);
    }
    let machine = control::connect(args.which.control.as_deref())?;
    if args.batch {
        return batch::main(args, machine);
    }
    if !output::is_terminal() {
        return Err(Failure::wrong_use("standard output is no terminal to draw on")
            .next("print instead: gnttab top --batch"));
    }
    let stop = Stop::new()?;
    let mut terminal = ratatui::try_init().map_err(|error| Failure::new(format!("the terminal: {error}")))?;
    let outcome = show(args, machine, &mut terminal, &stop);
    ratatui::restore();
    outcome
}

fn show(
    args: &Top,
    mut machine: Client,
    terminal: &mut ratatui::DefaultTerminal,
    stop: &Stop,
) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::new(format!("the terminal: {error}"));
    let events = events()?;
    let mut app = App::new(args.interval, args.sort, &args.filter, output::colour_on_stdout());
    let mut next = Instant::now();
    loop {
        if next <= Instant::now() {
            if !app.is_paused() {
                app.is_stale = false;
                if let Err(failure) = look(&mut app, &mut machine) {
                    // A machine that is busy is waited for, with what was seen last; one that has gone is not.
                    match control::connect(args.which.control.as_deref()) {
                        Ok(again) if app.machine.is_some() => machine = again,
                        _ => return Err(failure),
                    }
                    app.is_stale = true;
                }
            }
            next = Instant::now() + app.interval();
        }
        terminal
            .draw(|frame| draw::draw(frame, &mut app))
            .map_err(failed)?;
        // Until there is something to draw: a key, another size, another look.
        loop {
            if stop.asked_within(Duration::ZERO) {
                return Ok(());
            }
            let patience = next.saturating_duration_since(Instant::now()).min(LOOK);
            match events.recv_timeout(patience) {
                Ok(Event::Key(key)) if key.kind != KeyEventKind::Release => match app.key(key) {
                    Then::Leave => return Ok(()),
                    Then::Look => next = Instant::now(),
                    Then::Draw => {}
                },
                Ok(Event::Resize(..)) => {}
                Ok(_) => continue,
                Err(RecvTimeoutError::Timeout) if next <= Instant::now() => {}
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            break;
        }
    }
}

/// What the terminal says, read by a thread of its own: on a terminal that was hung up, reading neither ends
/// nor fails, and whoever reads sees no signal.
fn events() -> Result<mpsc::Receiver<Event>, Failure> {
    let (tell, events) = mpsc::channel();
    let read = move || {
        while let Ok(event) = event::read() {
            if tell.send(event).is_err() {
                return;
            }
        }
    };
    thread::Builder::new()
        .name("keys".to_owned())
        .spawn(read)
        .map_err(|error| Failure::new(format!("the terminal: {error}")))?;
    Ok(events)
}

fn look(app: &mut App, machine: &mut Client) -> Result<(), Failure> {
    let info = machine.machine().map_err(control::failed)?;
    let domains = machine.domains().map_err(control::failed)?;
    app.take(Instant::now(), info, domains);
    if let Some(id) = app.opened() {
        // It may have gone meanwhile.
        app.open_table(machine.table(id).ok());
    }
    Ok(())
}
