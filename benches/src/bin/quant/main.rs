//! `cargo xtask bench quant [--peers]`: pt-quant's kernels against bitsandbytes, torch, llama.cpp and the memory's roofs.
//!
//! The rows are those of the targets that the crate's README shows. Each number of threads is a process of its own; on
//! one thread it and its peers are pinned to one core, where they run in turns. `cargo bench -p pt-benches` has the same
//! kernels under criterion, without peers.

mod blocks;
mod contest;
mod deltas;
mod forced;
mod inputs;
mod peer;
mod products;
mod table;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use pt_benches::{Record, llama_cpp_python};
use pt_quant::Isa;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use contest::Bench;

#[derive(Parser)]
struct Args {
    /// Python with the peers' packages.
    #[arg(long)]
    peers: Option<PathBuf>,
    /// Only this row; may be given several times.
    #[arg(long)]
    row: Vec<u8>,
    /// Only this many threads; without it, one and all.
    #[arg(long)]
    threads: Option<usize>,
    /// Measure nothing: write the table of this record again.
    #[arg(long)]
    table_of: Option<PathBuf>,
    /// Measure in this process and print JSON.
    #[arg(long, hide = true)]
    once: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let cores = std::thread::available_parallelism()?.get();
    if args.once {
        return once(&args, args.threads.unwrap_or(1));
    }
    let mut all_threads = args.threads.map_or(vec![1, cores], |threads| vec![threads]);
    all_threads.dedup();
    if let Some(path) = &args.table_of {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let lines = text.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
        return write_table(path, &lines);
    }
    let setting = json!({"isa": Isa::detect().name(), "rows": args.row});
    // A run of some rows does not replace the record of all.
    let rows: String = args.row.iter().map(|row| format!("-{row}")).collect();
    let suite = if rows.is_empty() { "quant".to_owned() } else { format!("quant-rows{rows}") };
    let mut record = Record::new(&suite, setting)?;
    let mut lines = Vec::new();
    let mut outcome = Ok(());
    for threads in all_threads {
        let measured = measure(&args, threads, cores, &mut |line| {
            record.add(line.clone());
            lines.push(line);
        });
        outcome = outcome.and(measured);
    }
    let path = record.path().to_owned();
    record.save()?;
    write_table(&path, &lines)?;
    // What was measured before a failure is kept.
    outcome
}

/// Writes the table beside its record, and prints it.
fn write_table(record: &Path, lines: &[Value]) -> Result<()> {
    let contests: Vec<Value> = lines.iter().filter(|line| line["row"].is_number()).cloned().collect();
    let table = table::markdown(&contests);
    println!("\n{table}");
    let path = record.with_extension("md");
    fs::write(&path, format!("# pt-quant against its anchors\n\n{table}"))
        .with_context(|| format!("cannot write {}", path.display()))?;
    println!("written to {}", path.display());
    Ok(())
}

/// Runs this program again for one number of threads, pinned to the last core when that is one.
fn measure(args: &Args, threads: usize, cores: usize, add: &mut dyn FnMut(Value)) -> Result<()> {
    let own = std::env::current_exe()?;
    let last = (cores - 1).to_string();
    let can_pin = Command::new("taskset").args(["-c", &last, "true"]).status().is_ok_and(|status| status.success());
    let is_pinned = threads == 1 && can_pin;
    let mut command = Command::new(if is_pinned { PathBuf::from("taskset") } else { own.clone() });
    if is_pinned {
        command.args(["-c", &last]).arg(own);
    }
    command.args(["--once", "--threads", &threads.to_string()]);
    for row in &args.row {
        command.args(["--row", &row.to_string()]);
    }
    if let Some(python) = &args.peers {
        command.arg("--peers").arg(python);
    }
    // Large buffers in huge pages, as numpy's are in the peers; glibc reads it at the start.
    command.env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1").env("RAYON_NUM_THREADS", threads.to_string());
    add(json!({"threads": threads, "pinned": is_pinned}));
    let mut child = command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn()?;
    let output = child.stdout.take().context("no pipe")?;
    for line in BufReader::new(output).lines() {
        add(serde_json::from_str(&line?)?);
    }
    let status = child.wait()?;
    ensure!(status.success(), "the measurement on {threads} threads failed ({status})");
    Ok(())
}

fn once(args: &Args, threads: usize) -> Result<()> {
    let llama_cpp = args.peers.as_ref().and_then(|_| llama_cpp_python());
    let mut bench = Bench::new(threads, args.peers.as_deref(), llama_cpp.as_deref(), args.row.clone())?;
    println!("{}", json!({"threads": threads, "peers": bench.versions()}));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    pool.install(|| {
        blocks::all(&mut bench)?;
        products::all(&mut bench)?;
        deltas::all(&mut bench)?;
        forced::all(&mut bench)
    })
}
