//! `cargo xtask bench peft [--peers]`: every parameter-efficient method on one task, beside PEFT's and AdapterHub's.
//!
//! The task is that of `pt demo sft`, SQuAD's questions, in short rows. Two parts: `--quality` trains each method over
//! several seeds and scores held-out rows; `--timing` measures a few steps and decoding, on a machine that should do nothing
//! else. Each run is a process of its own, ours and the peer's in turns, on the same rows in the same order with the same
//! learning rates. The record grows run by run: who starts the suite again goes on where it stopped.

mod methods;
mod table;
mod worker;

use anyhow::{Context, Result, bail};
use clap::Parser;
use methods::{METHODS, Method, Peer};
use pt_benches::{Part, Record, answer_rows, json_of, model_path, peer_model};
use pt_model::Pretrained;
use pt_train::schedule::{Schedule, ScheduleConfig};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use worker::{Job, write_rows};

#[derive(Parser)]
struct Args {
    /// Python with PEFT.
    #[arg(long)]
    peers: Option<PathBuf>,
    /// Only train and score; may run on a busy machine.
    #[arg(long)]
    quality: bool,
    /// Only measure time and memory; wants an idle machine.
    #[arg(long)]
    timing: bool,
    /// Only this method; may be given several times.
    #[arg(long)]
    method: Vec<String>,
    /// Measure time and memory in f32 or bf16 only: where libtorch has no fast products in bf16 (x86-64 without AVX-512),
    /// the latter takes very long.
    #[arg(long)]
    dtype: Option<String>,
    /// Go on with this record instead of today's.
    #[arg(long)]
    record: Option<PathBuf>,
    /// Train ours with a third, once and three times each method's learning rate, and print the loss of other held-out
    /// rows; nothing is recorded.
    #[arg(long)]
    sweep: bool,
    /// Measure nothing: write the table of the record again.
    #[arg(long)]
    table: bool,
    /// Do one job in this process and print JSON.
    #[arg(long, hide = true)]
    job: Option<PathBuf>,
}

const SEEDS: u64 = 3;
const STEPS: usize = 10;
const BATCH: usize = 4;
const TIMED_STEPS: usize = 4;
const TIMED_BATCH: usize = 8;
const HELD_OUT: usize = 24;
const MAX_TOKENS: usize = 128;
const DECODED: usize = 32;
const DECODE_ROUNDS: usize = 3;

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(job) = &args.job {
        return worker::run(job);
    }
    let chosen: Vec<&Method> = match args.method.is_empty() {
        true => METHODS.iter().collect(),
        false => args.method.iter().map(|name| methods::find(name)).collect::<Result<_>>()?,
    };
    let bench = Bench::new(args.peers.clone())?;
    if args.sweep {
        return bench.sweep(&chosen);
    }
    let setting = json!({
        "steps": STEPS, "batch": BATCH, "max_tokens": MAX_TOKENS, "held_out_rows": HELD_OUT, "seeds": SEEDS,
        "timed_steps": TIMED_STEPS, "timed_batch": TIMED_BATCH, "decoded": DECODED,
    });
    let mut record = Record::resume("peft", setting, args.record.as_deref())?;
    let is_all = !args.quality && !args.timing;
    let mut cells = Vec::new();
    if args.quality || is_all {
        cells.extend(bench.quality(&chosen)?);
    }
    if args.timing || is_all {
        let is_wanted = |cell: &Cell| args.dtype.as_ref().is_none_or(|dtype| *dtype == cell.job.dtype);
        cells.extend(bench.timing(&chosen)?.into_iter().filter(is_wanted));
    }
    let mut failed = Vec::new();
    for cell in cells.iter().filter(|_| !args.table) {
        if record.lines().iter().any(|line| cell.is_in(line)) {
            continue;
        }
        match bench.measure(cell) {
            Ok(measured) => {
                record.add(cell.line(measured));
                record.keep()?;
            }
            // One that fails, for want of memory say, must not keep the others from being measured.
            Err(error) => {
                eprintln!("{}: {error:#}", cell.line(Value::Null));
                failed.push(format!("{} of {}", cell.method.name, cell.tool()));
            }
        }
    }
    let (path, table) = (record.path().with_extension("md"), table::markdown(record.lines()));
    record.save()?;
    println!("\n{table}");
    std::fs::write(path, format!("# Parameter-efficient methods on one task\n\n{table}"))?;
    if !failed.is_empty() {
        bail!("not measured: {}", failed.join(", "));
    }
    Ok(())
}

/// Half a cosine from the highest rate to zero.
pub(crate) fn schedule(steps: usize) -> Result<Schedule> {
    Ok(ScheduleConfig { warmup_steps: Some(0), ..Default::default() }.build(steps)?)
}

/// One run: which part of the record it belongs to, of which tool.
struct Cell {
    part: &'static str,
    method: &'static Method,
    peer: Option<Peer>,
    job: Job,
}

impl Cell {
    fn tool(&self) -> &'static str {
        self.peer.map_or("pt", Peer::name)
    }

    fn line(&self, measured: Value) -> Value {
        let (dtype, rate) = (&self.job.dtype, self.method.learning_rate);
        json!({
            "part": self.part, "method": self.method.name, "tool": self.tool(), "dtype": dtype, "seed": self.job.seed,
            "learning_rate": rate, "measured": measured,
        })
    }

    fn is_in(&self, line: &Value) -> bool {
        let own = self.line(Value::Null);
        ["part", "method", "tool", "dtype", "seed", "learning_rate"].iter().all(|field| own[field] == line[field])
    }
}

/// The rows and the peers' programs.
struct Bench {
    folder: tempfile::TempDir,
    peers: Option<PathBuf>,
    /// AdapterHub's package needs an environment of its own.
    adapters: Option<PathBuf>,
}

impl Bench {
    fn new(peers: Option<PathBuf>) -> Result<Self> {
        let squad = std::env::var_os("PT_SQUAD").context("PT_SQUAD is not set: run through `cargo xtask bench`")?;
        let pretrained = Pretrained::open(model_path()?)?;
        let folder = tempfile::tempdir()?;
        let parts = [
            ("training", Part::Training, STEPS * BATCH),
            ("validation", Part::Validation, HELD_OUT / 2),
            ("held_out", Part::HeldOut, HELD_OUT),
        ];
        for (name, part, count) in parts {
            let squad = Path::new(&squad).join("squad.json");
            let rows = answer_rows(&squad, &pretrained, part, count, MAX_TOKENS)?;
            write_rows(&folder.path().join(name), &rows)?;
        }
        let adapters = std::env::var_os("PT_ADAPTERS_PYTHON").map(PathBuf::from).filter(|_| peers.is_some());
        Ok(Self { folder, peers, adapters })
    }

    fn job(&self, method: &Method, seed: u64, rate: f64) -> Result<Job> {
        let schedule = schedule(STEPS)?;
        Ok(Job {
            method: method.name.into(),
            is_nf4: method.is_nf4,
            seed,
            dtype: "f32".into(),
            learning_rates: (0..STEPS).map(|step| rate * schedule.factor(step)).collect(),
            batch: BATCH,
            rows: self.folder.path().join("training"),
            order: shuffled(STEPS * BATCH, seed),
            held_out: Some(self.folder.path().join("held_out")),
            decode: 0,
            decode_rounds: DECODE_ROUNDS,
        })
    }

    /// Seed by seed, so that a run which is cut short has all methods; last what is slowest by far, PEFT over 4-bit weights.
    fn quality(&self, chosen: &[&'static Method]) -> Result<Vec<Cell>> {
        let mut cells = Vec::new();
        for seed in 0..SEEDS {
            for &method in chosen.iter().filter(|method| seed == 0 || !method.is_base()) {
                for peer in self.tools(method) {
                    let job = self.job(method, seed, method.learning_rate)?;
                    cells.push(Cell { part: "quality", method, peer, job });
                }
            }
        }
        cells.sort_by_key(|cell| cell.peer.is_some() && cell.method.is_nf4);
        Ok(cells)
    }

    /// A few larger steps of each method and then decoding: ours, the peer, ours in bf16.
    fn timing(&self, chosen: &[&'static Method]) -> Result<Vec<Cell>> {
        let mut cells = Vec::new();
        for &method in chosen.iter().filter(|method| !method.is_base()) {
            let mut job = self.job(method, 0, method.learning_rate)?;
            job.learning_rates.truncate(TIMED_STEPS);
            job.batch = TIMED_BATCH;
            job.held_out = None;
            let in_bf16 = Job { dtype: "bf16".into(), ..job.clone() };
            for peer in self.tools(method) {
                let decode = if peer.is_none() { DECODED } else { 0 };
                cells.push(Cell { part: "timing", method, peer, job: Job { decode, ..job.clone() } });
            }
            // Full fine-tuning holds its weights in f32.
            if method.name != "full" {
                cells.push(Cell { part: "timing", method, peer: None, job: in_bf16 });
            }
        }
        Ok(cells)
    }

    /// Ours, and the peer that has the method where there is a Python for it.
    fn tools(&self, method: &Method) -> Vec<Option<Peer>> {
        let peer = method.peer.filter(|&peer| self.python(peer).is_some());
        std::iter::once(None).chain(peer.map(Some)).collect()
    }

    fn python(&self, peer: Peer) -> Option<&Path> {
        match peer {
            Peer::Peft => self.peers.as_deref(),
            Peer::AdapterHub => self.adapters.as_deref(),
        }
    }

    fn measure(&self, cell: &Cell) -> Result<Value> {
        let path = self.folder.path().join("job.json");
        std::fs::write(&path, serde_json::to_vec(&cell.job)?)?;
        let mut command = match cell.peer {
            None => Command::new(std::env::current_exe()?),
            Some(peer) => {
                let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers");
                let maker = self.peers.as_deref().context("--peers names no Python")?;
                let mut command = Command::new(self.python(peer).context("AdapterHub's package has no Python")?);
                command.arg(scripts.join("peft_peer.py")).arg("--model").arg(peer_model(maker, &scripts)?);
                command
            }
        };
        if cell.part == "quality" {
            // Beside other work, threads that spin while they wait cost both sides most of their time.
            command.env("OMP_WAIT_POLICY", "passive");
        }
        json_of(command.arg("--job").arg(&path))
    }

    fn sweep(&self, chosen: &[&'static Method]) -> Result<()> {
        for &method in chosen.iter().filter(|method| !method.is_base()) {
            for factor in [1.0 / 3.0, 1.0, 3.0] {
                let rate = method.learning_rate * factor;
                let mut job = self.job(method, SEEDS, rate)?;
                job.held_out = Some(self.folder.path().join("validation"));
                let measured = self.measure(&Cell { part: "quality", method, peer: None, job })?;
                println!(
                    "{:<14} {rate:<8.1e} loss {:.4}",
                    method.name,
                    measured["held_out_loss"].as_f64().unwrap_or(f64::NAN)
                );
            }
        }
        Ok(())
    }
}

/// 0..count in an order that the seed decides, the same on every machine.
fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    let mut state = seed + 1;
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        order.swap(last, (state >> 33) as usize % (last + 1));
    }
    order
}
