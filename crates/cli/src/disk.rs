//! `gnttab disk`: an image served from one domain to another, exported as NBD.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::args::Disk;
use crate::block::BlockDevice as _;
use crate::failure::Failure;
use crate::file::FileDevice;
use crate::image::Image;
use crate::live::{Rates, Stop};
use crate::nbd::connection::Export;
use crate::nbd::listener::{ListenError, Listener};
use crate::nbd::server::{Server, Totals};
use crate::{output, place};

/// How often the rates are drawn.
const INTERVAL: Duration = Duration::from_millis(500);

/// Serves the image until told to stop.
pub(crate) fn main(args: &Disk) -> Result<(), Failure> {
    let image = Image::open(&args.image, args.read_only)?;
    if let Some(format) = image.looks_like() {
        output::say(&format!(
            "gnttab disk: note: {} looks like {format}, and is served as raw bytes; convert it with: qemu-img convert",
            args.image.display()
        ));
    }
    let listener = listen(args, &image)?;
    let stop = Stop::new()?;
    if args.direct {
        serve_directly(args, &image, listener, &stop)
    } else {
        Err(Failure::new("disk: domains are not there yet").next("try --direct"))
    }
}

/// The baseline: no domains.
fn serve_directly(args: &Disk, image: &Image, listener: Listener, stop: &Stop) -> Result<(), Failure> {
    let address = listener.to_string();
    let fail = |error| Failure::new(format!("NBD server at {address}: {error}"));
    let file = Arc::new(image.file().try_clone().map_err(fail)?);
    let device = || FileDevice::new(Arc::clone(&file), image.size(), image.is_read_only());
    let devices: Vec<FileDevice> = (0..args.rings.queues).map(|_| device()).collect();
    let export = Export {
        name: image.name().to_owned(),
        description: format!("{} served by gnttab, with no domains between", image.name()),
        geometry: device().geometry(),
    };
    let server = Server::start(listener, export, devices).map_err(fail)?;
    announce(args, image, &address);
    let started = Instant::now();
    let mut rates = Rates::new(args.json);
    while !stop.asked_within(INTERVAL) {
        rates.draw(server.counters().totals());
    }
    rates.clear();
    let counters = Arc::clone(server.counters());
    server.stop();
    sum_up(args, started.elapsed(), &counters.totals());
    Ok(())
}

fn listen(args: &Disk, image: &Image) -> Result<Listener, Failure> {
    let listener = match (&args.socket, args.tcp) {
        (_, Some(port)) => Listener::tcp(port),
        (Some(path), None) => Listener::unix(path),
        (None, None) => Listener::unix(&place::folder()?.join(format!("{}.nbd", image.name()))),
    };
    listener.map_err(|error| {
        let next = match &error {
            ListenError::SocketBusy(_) | ListenError::NotASocket(_) => "choose another with: --socket PATH",
            ListenError::PathTooLong(_) => "choose a shorter one with: --socket PATH",
            ListenError::PortBusy(_) | ListenError::Port { .. } => "take any that is free with: --tcp 0",
            ListenError::Socket { .. } => "choose a place that you may write with: --socket PATH",
        };
        Failure::new(&error).next(next)
    })
}

/// Says where the disk is to be had: the address alone is data.
fn announce(args: &Disk, image: &Image, address: &str) {
    if args.json {
        let (size, read_only) = (image.size(), image.is_read_only());
        let event = json!({
            "event": "serving", "address": address, "image": args.image, "size": size, "read_only": read_only,
        });
        output::json("disk", event);
    } else {
        output::line(address);
        output::say(&format!(
            "serving {} ({}{}); stop with Ctrl-C; try: qemu-img info '{address}'",
            image.name(),
            output::bytes(image.size()),
            if image.is_read_only() { ", read-only" } else { "" },
        ));
    }
}

/// Says what was done.
fn sum_up(args: &Disk, time: Duration, totals: &Totals) {
    if args.json {
        output::json(
            "disk",
            json!({ "event": "stopped", "seconds": time.as_secs_f64(), "totals": totals }),
        );
    } else {
        output::say(&format!(
            "stopped after {:.1} s: read {} in {} requests, wrote {} in {}, {} flushes, {} errors",
            time.as_secs_f64(),
            output::bytes(totals.bytes_read),
            totals.reads,
            output::bytes(totals.bytes_written),
            totals.writes,
            totals.flushes,
            totals.errors,
        ));
    }
}
