//! `mainstay demo`: the whole journey, proved.

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use mainstay_lab::{
    DiskImage, GuestImages, Lab, LabOptions,
    demo::{DemoReport, Narrator, PhaseReport, Progress},
};

use crate::{exit::Exit, lab::parse_mebibytes, output};

#[derive(Args)]
pub(crate) struct DemoArguments {
    /// Leaves the lab up and says how to go on by hand.
    #[arg(long)]
    keep: bool,
    /// Writes the report as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The lab's directory; a temporary one by default.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Size of each of the guest's two disks.
    #[arg(long, default_value = "256M", value_parser = parse_mebibytes)]
    disk_size: u64,
}

/// Tells the journey on standard error.
struct Terminal {
    bar: ProgressBar,
    /// Where nothing tells how much there is to do.
    open: ProgressStyle,
    /// Where something does.
    measured: ProgressStyle,
}

impl Terminal {
    fn new() -> anyhow::Result<Self> {
        let bar = ProgressBar::new_spinner();
        let open = ProgressStyle::with_template("{spinner} {prefix} ({elapsed})  {msg}")?;
        let measured = ProgressStyle::with_template(
            "{spinner} {prefix} ({elapsed})  [{bar:24}] {binary_bytes}/{binary_total_bytes}  {msg}",
        )?;
        bar.set_style(open.clone());
        bar.enable_steady_tick(Duration::from_millis(200));
        Ok(Self { bar, open, measured: measured.progress_chars("=> ") })
    }
}

impl Narrator for Terminal {
    fn begin(&self, name: &str) {
        self.bar.reset_elapsed();
        self.bar.set_prefix(name.to_owned());
        self.progress(&Progress::default());
    }

    fn progress(&self, progress: &Progress) {
        if progress.bytes_total > 0 {
            self.bar.set_style(self.measured.clone());
            self.bar.set_length(progress.bytes_total);
            self.bar.set_position(progress.bytes_done);
        } else {
            self.bar.set_style(self.open.clone());
        }
        let mut parts = Vec::new();
        if !progress.task.is_empty() {
            parts.push(progress.task.clone());
        }
        if progress.bytes_moved > 0 {
            parts.push(format!("{} moved", output::bytes(progress.bytes_moved)));
        }
        if let Some(seconds) = progress.rpo_seconds {
            parts.push(format!("RPO {seconds} s"));
        }
        self.bar.set_message(parts.join(" · "));
    }

    fn say(&self, text: &str) {
        self.bar.suspend(|| output::note(text));
    }

    fn end(&self, report: &PhaseReport) {
        let sign = if report.proved { "✓" } else { "✗" };
        let text = format!("{sign} {:<22} {:>6.1} s   {}", report.name, report.seconds, report.notes);
        self.bar.suspend(|| output::note(&text));
    }
}

pub(crate) async fn run(arguments: DemoArguments) -> anyhow::Result<Exit> {
    let dir = match &arguments.dir {
        Some(dir) => dir.clone(),
        None => mainstay_lab::scratch_dir().join(format!("mainstay-demo-{}", std::process::id())),
    };
    let options = LabOptions {
        has_relays: true,
        far_server: None,
        vms: 1,
        disk_mib: arguments.disk_size,
        format: DiskImage::Qcow2,
        guest_options: "ledger.rate=20 ledger.churn_kib=256".to_owned(),
        program: std::env::current_exe()?,
        images: GuestImages::find()?,
    };
    // What is there already is not ours to take down.
    Lab::claim(&dir)?;
    let terminal = Terminal::new()?;
    terminal.begin("two sites, a server, two agents, a guest");
    let outcome = tokio::select! {
        outcome = journey(&dir, &options, &terminal) => outcome,
        stopped = crate::server::terminated() => stopped.and(Err(anyhow::anyhow!("interrupted"))),
    };
    terminal.bar.finish_and_clear();
    if arguments.keep {
        output::note(&format!("the lab is left up in {}; go on with:", dir.display()));
        let program = options.program.display();
        output::hint(&format!("{program} --lab {} item list", dir.display()));
        output::hint(&format!("{program} lab status --dir {}", dir.display()));
        output::hint(&format!("{program} lab down --dir {}", dir.display()));
    }
    let is_down = if arguments.keep { Ok(()) } else { Lab::down(&dir).await.context("take the lab down") };
    // Written in any case: whoever reads it wants to know above all when it did not work.
    if let Some(path) = &arguments.json {
        let failed = DemoReport::default();
        let report = outcome.as_ref().unwrap_or(&failed);
        std::fs::write(path, serde_json::to_vec_pretty(report)?)
            .with_context(|| format!("write {}", path.display()))?;
    }
    let report = outcome?;
    table(&report);
    is_down?;
    Ok(if report.ok { Exit::Done } else { Exit::Failed })
}

async fn journey(
    dir: &std::path::Path,
    options: &LabOptions,
    terminal: &Terminal,
) -> anyhow::Result<DemoReport> {
    let mut lab = Lab::build(dir, options).await?;
    terminal.say("✓ two sites, a server, two agents and a guest are up");
    Ok(mainstay_lab::demo::run(&mut lab, terminal).await)
}

fn table(report: &DemoReport) {
    let seconds = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1} s"));
    let bytes = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), output::bytes);
    let rows = report
        .phases
        .iter()
        .map(|phase| {
            let ledger = match &phase.ledger {
                Some(ledger) => format!(
                    "last {}, ack {}, {} corrupt, {} gaps",
                    ledger.last, ledger.acknowledged, ledger.corrupt, ledger.gaps
                ),
                None => "-".to_owned(),
            };
            vec![
                phase.name.clone(),
                format!("{:.1} s", phase.seconds),
                bytes(phase.bytes_changed),
                bytes(phase.bytes_moved),
                seconds(phase.rpo_seconds),
                seconds(phase.rto_seconds),
                ledger,
                if phase.proved { "proved" } else { "NOT PROVED" }.to_owned(),
            ]
        })
        .collect();
    output::table(&["PHASE", "TIME", "CHANGED", "MOVED", "RPO", "RTO", "LEDGER", "VERDICT"], rows);
}
