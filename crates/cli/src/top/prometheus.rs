//! What the control socket tells, as Prometheus reads it (text format 0.0.4): once, or to whoever asks over HTTP.

use std::fmt::{self, Display, Write as _};
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use gnttab_host::monitor::{ConsumerInfo, DomainInfo, MachineInfo, State};

use crate::args::Top;
use crate::control;
use crate::failure::Failure;
use crate::live::Stop;
use crate::output;

/// How long a caller may take to ask and to read. Callers are answered one after the other.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of a request that are read.
const REQUEST: usize = 4096;

/// Prints it once, or lets it be asked for at a port of 127.0.0.1 until it is told to stop.
pub(super) fn main(args: &Top) -> Result<(), Failure> {
    let control = args.which.control.clone();
    let text = look(control.as_deref())?;
    let Some(port) = args.listen else {
        output::line(text.trim_end());
        return Ok(());
    };
    let stop = Stop::new()?;
    let fail = |error: io::Error| {
        Failure::new(format!("port {port} of 127.0.0.1: {error}"))
            .next("take any that is free with: --listen 0")
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(fail)?;
    let address = listener.local_addr().map_err(fail)?;
    output::line(&format!("http://{address}/metrics"));
    output::say("Ctrl-C ends it");
    let answer_all = move || {
        for stream in listener.incoming().flatten() {
            // Who asked and left needs no answer.
            let _ = answer(stream, control.as_deref());
        }
    };
    thread::Builder::new()
        .name("scraped".to_owned())
        .spawn(answer_all)
        .map_err(fail)?;
    while !stop.asked_within(Duration::from_secs(3600)) {}
    Ok(())
}

/// Asks the machine. Another one may have taken its place since the last time.
fn look(control: Option<&Path>) -> Result<String, Failure> {
    let mut client = control::connect(control)?;
    let machine = client.machine().map_err(control::failed)?;
    let domains = client.domains().map_err(control::failed)?;
    Ok(text(&machine, &domains))
}

/// Answers one request.
fn answer(mut stream: TcpStream, control: Option<&Path>) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && request.len() < REQUEST {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let mut some = [0; 512];
        match stream.read(&mut some)? {
            0 => break,
            len => request.extend_from_slice(&some[..len]),
        }
    }
    let (status, body) = if !request.starts_with(b"GET /metrics ") {
        (
            "404 Not Found",
            "there is only one thing here: GET /metrics\n".to_owned(),
        )
    } else {
        match look(control) {
            Ok(text) => ("200 OK", text),
            Err(failure) => ("503 Service Unavailable", format!("{failure}\n")),
        }
    };
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// A figure's name, its type, what it is, and its samples: labels and value.
struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    samples: Vec<(String, f64)>,
}

impl Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.samples.is_empty() {
            return Ok(());
        }
        writeln!(f, "# HELP {} {}", self.name, self.help)?;
        writeln!(f, "# TYPE {} {}", self.name, self.kind)?;
        for (labels, value) in &self.samples {
            match &**labels {
                "" => writeln!(f, "{} {value}", self.name)?,
                labels => writeln!(f, "{}{{{labels}}} {value}", self.name)?,
            }
        }
        Ok(())
    }
}

/// A label, as it is written.
fn label(name: &str, value: impl Display) -> String {
    let value = value
        .to_string()
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n");
    format!("{name}=\"{value}\"")
}

/// Everything that is known of the machine.
fn text(machine: &MachineInfo, domains: &[DomainInfo]) -> String {
    let mut text = String::new();
    for family in of_machine(machine).iter().chain(&of_domains(domains)) {
        // Writing to a string does not fail.
        let _ = write!(text, "{family}");
    }
    text
}

#[expect(clippy::cast_precision_loss, reason = "a sample is a 64-bit float")]
fn float(count: u64) -> f64 {
    count as f64
}

fn seconds(ms: u64) -> f64 {
    float(ms) / 1000.0
}

fn of_machine(machine: &MachineInfo) -> Vec<Family> {
    let one = |name, help, value: f64| Family {
        name,
        kind: "gauge",
        help,
        samples: vec![(String::new(), value)],
    };
    let program = label("program", &machine.program);
    let count = |count: usize| float(u64::try_from(count).unwrap_or(u64::MAX));
    vec![
        Family {
            samples: vec![(program, 1.0)],
            ..one("gnttab_machine_info", "The program that runs the machine.", 1.0)
        },
        one(
            "gnttab_uptime_seconds",
            "How long the machine has been running.",
            seconds(machine.age_ms),
        ),
        one("gnttab_vcpus", "vCPUs of all domains.", count(machine.vcpus.0)),
        one(
            "gnttab_vcpus_limit",
            "vCPUs that there may be.",
            count(machine.vcpus.1),
        ),
        one(
            "gnttab_dying_domains",
            "Dead domains whose pages others still use.",
            count(machine.holds.dying),
        ),
        one(
            "gnttab_monitor_descriptors",
            "Descriptors that the monitor has open.",
            count(machine.holds.descriptors),
        ),
    ]
}

/// Collects the families of domains: one sample, or several, of each domain.
struct Collector<'a> {
    domains: &'a [DomainInfo],
    families: Vec<Family>,
}

impl<'a> Collector<'a> {
    /// Several samples a domain, each with one more label.
    fn each<L: Display, I: IntoIterator<Item = (L, f64)>>(
        &mut self,
        (name, kind): (&'static str, &'static str),
        help: &'static str,
        other: &'static str,
        samples: impl Fn(&'a DomainInfo) -> I,
    ) {
        let of_one = |domain: &'a DomainInfo| {
            let labels = whose(domain);
            let labelled = move |(value, sample)| (format!("{labels},{}", label(other, value)), sample);
            samples(domain).into_iter().map(labelled)
        };
        let samples = self.domains.iter().flat_map(of_one).collect();
        self.families.push(Family {
            name,
            kind,
            help,
            samples,
        });
    }

    /// At most one sample a domain.
    fn gauge(&mut self, name: &'static str, help: &'static str, sample: impl Fn(&DomainInfo) -> Option<f64>) {
        let of_one = |domain: &'a DomainInfo| Some((whose(domain), sample(domain)?));
        let samples = self.domains.iter().filter_map(of_one).collect();
        self.families.push(Family {
            name,
            kind: "gauge",
            help,
            samples,
        });
    }
}

/// The labels that say which domain it is.
fn whose(domain: &DomainInfo) -> String {
    format!("{},{}", label("domain", domain.id), label("name", &domain.name))
}

fn of_domains(domains: &[DomainInfo]) -> Vec<Family> {
    let mut all = Collector {
        domains,
        families: Vec::new(),
    };
    all.each(
        ("gnttab_domain_state", "gauge"),
        "1 for the state that the domain is in.",
        "state",
        |domain| {
            let state = match domain.state {
                State::Starting => "starting",
                State::Running => "running",
                State::Dying => "dying",
            };
            [(state, 1.0)]
        },
    );
    all.gauge(
        "gnttab_domain_isolated",
        "Whether every wall that matters stands around the domain's process.",
        |domain| Some(f64::from(u8::from(domain.isolated))),
    );
    all.gauge(
        "gnttab_table_version",
        "Version of the domain's grant table.",
        |domain| Some(domain.version.into()),
    );
    all.gauge("gnttab_frames", "Frames of the domain's grant table.", |domain| {
        Some(domain.grant_frames.0.into())
    });
    all.gauge("gnttab_frames_limit", "Frames that there may be.", |domain| {
        Some(domain.grant_frames.1.into())
    });
    all.each(
        ("gnttab_entries", "gauge"),
        "Entries of the domain's grant table, by kind.",
        "kind",
        |domain| {
            let entries = domain.entries;
            [
                ("free", entries.free),
                ("permit_access", entries.permit_access),
                ("sub_page", entries.sub_page),
                ("accept_transfer", entries.accept_transfer),
                ("transitive", entries.transitive),
                ("withdrawn", entries.withdrawn),
            ]
            .map(|(kind, count)| (kind, f64::from(count)))
        },
    );
    all.gauge(
        "gnttab_entries_limit",
        "Entries that there may be, in all frames.",
        |domain| Some(float(domain.entries.most)),
    );
    all.gauge("gnttab_entries_in_use", "Entries that somebody uses.", |domain| {
        Some(domain.in_use.into())
    });
    all.each(
        ("gnttab_pins", "gauge"),
        "Pins on the domain's entries, by the domain that holds them.",
        "by",
        |domain| domain.pinned_by.iter().map(|(by, pins)| (by, f64::from(*pins))),
    );
    all.each(
        ("gnttab_mappings", "gauge"),
        "Mappings that the domain holds, by granter.",
        "granter",
        |domain| {
            let maps = domain.maps.iter();
            maps.map(|(granter, count)| (granter, f64::from(*count)))
        },
    );
    all.gauge(
        "gnttab_mappings_limit",
        "Mappings that the domain may hold.",
        |domain| Some(float(domain.handles.1)),
    );
    all.gauge(
        "gnttab_oldest_mapping_seconds",
        "Age of the oldest mapping that the domain holds.",
        |domain| domain.oldest_mapping_ms.map(seconds),
    );
    all.gauge(
        "gnttab_page_references",
        "References that others hold on the domain's pages.",
        |domain| Some(float(domain.page_references)),
    );
    all.each(
        ("gnttab_operations_total", "counter"),
        "Items of operations that the domain called.",
        "operation",
        |domain| {
            domain
                .operations
                .iter()
                .map(|(name, count)| (name, float(*count)))
        },
    );
    all.each(
        ("gnttab_statuses_total", "counter"),
        "Statuses that the domain was given.",
        "status",
        |domain| domain.statuses.iter().map(|(name, count)| (name, float(*count))),
    );
    said(&mut all);
    all.families
}

/// What domains say of their own tables.
fn said(all: &mut Collector<'_>) {
    all.gauge(
        "gnttab_pending_ends",
        "Grants that the domain wants back, and a peer still uses.",
        |domain| Some(domain.says.as_ref()?.pending_total.into()),
    );
    all.gauge(
        "gnttab_leaked_references",
        "References that the domain's driver has given up for good.",
        |domain| Some(float(domain.says.as_ref()?.leaked)),
    );
    all.each(
        ("gnttab_consumer_references", "gauge"),
        "References that a consumer in the domain has.",
        "consumer",
        |domain| consumers(domain).map(|consumer| (&consumer.name, f64::from(consumer.used))),
    );
    all.each(
        ("gnttab_consumer_quota", "gauge"),
        "References that a consumer in the domain may have.",
        "consumer",
        |domain| consumers(domain).filter_map(|consumer| Some((&consumer.name, consumer.quota?.into()))),
    );
    all.each(
        ("gnttab_consumer_refused_total", "counter"),
        "How often a consumer in the domain was refused references.",
        "consumer",
        |domain| consumers(domain).map(|consumer| (&consumer.name, float(consumer.refused))),
    );
}

fn consumers(domain: &DomainInfo) -> impl Iterator<Item = &ConsumerInfo> {
    domain.says.iter().flat_map(|says| &says.consumers)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::pulse::tests::domain;

    #[test]
    fn a_family_has_one_heading_and_its_samples_together() {
        let domains = [
            domain(1, "a", json!({ "operations": { "copy": 5, "map_grant_ref": 2 } })),
            domain(
                2,
                "b",
                json!({ "operations": { "copy": 1 }, "pinned_by": { "1": 3 } }),
            ),
        ];
        let text: String = of_domains(&domains).iter().map(ToString::to_string).collect();
        assert!(text.contains(
            "# HELP gnttab_operations_total Items of operations that the domain called.\n\
             # TYPE gnttab_operations_total counter\n\
             gnttab_operations_total{domain=\"1\",name=\"a\",operation=\"copy\"} 5\n\
             gnttab_operations_total{domain=\"1\",name=\"a\",operation=\"map_grant_ref\"} 2\n\
             gnttab_operations_total{domain=\"2\",name=\"b\",operation=\"copy\"} 1\n"
        ));
        assert!(text.contains("gnttab_pins{domain=\"2\",name=\"b\",by=\"1\"} 3\n"));
        // What nobody has is not there, heading and all.
        assert!(!text.contains("gnttab_oldest_mapping_seconds"), "{text}");
    }

    #[test]
    fn names_cannot_break_out_of_their_quotes() {
        let says = json!({ "age_ms": 1, "refs": [512, 504], "leaked": 0, "pending_total": 0, "pending": [],
            "consumers": [{ "name": "a\"} 1\n\\", "used": 4, "quota": null, "refused": 0 }] });
        let domains = [domain(1, "", json!({ "says": says }))];
        let text: String = of_domains(&domains).iter().map(ToString::to_string).collect();
        let line = "gnttab_consumer_references{domain=\"1\",name=\"\",consumer=\"a\\\"} 1\\n\\\\\"} 4";
        assert!(text.lines().any(|found| found == line), "{text}");
    }
}
