//! `gnttab disk`: an image served from one domain to another, exported as NBD.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gnttab_host::monitor::DomainInfo;
use serde_json::{Value, json};

use crate::args::Disk;
use crate::block::BlockDevice as _;
use crate::failure::Failure;
use crate::file::FileDevice;
use crate::image::Image;
use crate::live::{Rates, Stop};
use crate::nbd::connection::Export;
use crate::nbd::listener::{ListenError, Listener};
use crate::nbd::server::{Server, Totals};
use crate::roles::{News, Sum};
use crate::session::{DiskPlan, DomainPlan, Event, JobPlan, RingPlan, Session};
use crate::{output, place};

/// How often the rates are drawn.
const INTERVAL: Duration = Duration::from_millis(500);

/// How long the domains may take to connect.
const READY: Duration = Duration::from_secs(20);

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
        serve(args, image, listener, &stop)
    }
}

/// A backend domain has the image, a frontend domain the clients.
fn serve(args: &Disk, image: Image, listener: Listener, stop: &Stop) -> Result<(), Failure> {
    let address = listener.to_string();
    let about = About {
        image: args.image.clone(),
        size: image.size(),
        read_only: image.is_read_only(),
    };
    let name = format!("disk-{}", std::process::id());
    let domains = vec![DomainPlan::new("backend"), DomainPlan::new("frontend")];
    let rings = RingPlan {
        queues: args.rings.queues.into(),
        order: args.rings.ring_order.into(),
        sharing: args.rings.sharing,
    };
    let disk = DiskPlan {
        image,
        backend: 0,
        frontend: 1,
        rings,
        job: JobPlan::Export(listener),
    };
    let mut session = Session::start(&name, domains, vec![disk])?;
    let started = Instant::now();
    let mut rates = Rates::new(args.json);
    let mut totals = Sum::default();
    let mut announced = false;
    while !stop.asked_within(Duration::ZERO) {
        match session.next_event(INTERVAL)? {
            Some(Event::Word { word, .. }) => {
                totals.hear(&word.news);
                match word.news {
                    News::Ready if !announced => {
                        announced = true;
                        announce(args, &about, &address, &session.infos());
                    }
                    News::Totals(_) => rates.draw(totals.now()),
                    _ => {}
                }
            }
            Some(Event::Restarted { name, how }) => {
                let domains: Vec<_> = session.infos().iter().map(brief).collect();
                if args.json {
                    let event =
                        json!({ "event": "restarted", "domain": name, "how": how, "domains": domains });
                    output::json("disk", event);
                } else {
                    output::say(&format!("domain {name} {how}; another has taken its place"));
                }
            }
            Some(Event::Ended { .. }) | None => {}
        }
        if !announced && started.elapsed() > READY {
            return Err(Failure::new(format!(
                "disk {}: the domains did not connect",
                about.image.display()
            ))
            .next("what they said is above"));
        }
    }
    rates.clear();
    session.stop(|word| totals.hear(&word.news))?;
    sum_up(args, started.elapsed(), &totals.now());
    Ok(())
}

/// What an image's file is, when the image has gone to its domain.
struct About {
    image: PathBuf,
    size: u64,
    read_only: bool,
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
    let about = About {
        image: args.image.clone(),
        size: image.size(),
        read_only: image.is_read_only(),
    };
    announce(args, &about, &address, &[]);
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
fn announce(args: &Disk, about: &About, address: &str, domains: &[DomainInfo]) {
    if args.json {
        let event = json!({
            "event": "serving",
            "address": address,
            "image": about.image,
            "size": about.size,
            "read_only": about.read_only,
            "domains": domains.iter().map(brief).collect::<Vec<_>>(),
        });
        output::json("disk", event);
    } else {
        output::line(address);
        let read_only = if about.read_only { ", read-only" } else { "" };
        output::say(&format!(
            "serving {} ({}{read_only}); stop with Ctrl-C; try: qemu-img info '{address}'",
            about.image.display(),
            output::bytes(about.size),
        ));
        for domain in domains {
            let pid = domain.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
            output::say(&format!("  d{} {}, process {pid}", domain.id, domain.name));
        }
    }
}

/// What names a domain.
fn brief(domain: &DomainInfo) -> Value {
    json!({ "id": domain.id, "name": domain.name, "pid": domain.pid, "isolated": domain.isolated })
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
