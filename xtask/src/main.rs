//! The workspace's own tasks: `cargo xtask <task>`. Needs no libtorch, so it starts on a bare machine.

#![forbid(unsafe_code)]

mod args;
mod bench;
mod demo;
mod fetch;
mod golden;
mod neon;
mod process;
mod setup;
mod test;
mod tidy;

use std::process::ExitCode;

use anyhow::Result;
use args::Task;

fn main() -> ExitCode {
    let task = match args::parse(std::env::args().skip(1)) {
        Ok(task) => task,
        Err(message) => {
            eprintln!("error: {message}\n\n{}", args::usage(None));
            return ExitCode::from(2);
        }
    };
    match run(task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            if let Some(hint) = error.chain().find_map(|cause| cause.downcast_ref::<pt_fetch::FetchError>()) {
                eprintln!("  hint: {}", hint.hint());
            }
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Help(topic) => {
            println!("{}", args::usage(topic));
            Ok(())
        }
        Task::Setup => setup::setup().map(drop),
        Task::Fetch { names } => fetch::fetch(&names),
        Task::Test { extra } => test::test(&extra),
        Task::TestNeon => neon::test(),
        Task::Demo { demo, extra } => demo::run_demo(demo, &extra),
        Task::Golden { area, regenerate } => golden::golden(area.as_deref(), regenerate),
        Task::Bench { suites, peers, extra } => bench::bench(&suites, peers, &extra),
        Task::Tidy { quick } => tidy::tidy(quick),
        Task::Ci => test::test(&[]).and_then(|()| tidy::tidy(false)),
    }
}
