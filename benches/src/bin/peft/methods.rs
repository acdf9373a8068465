//! What is compared, and with which settings.

use pt_model::LinearFormat;
use pt_tensor::{Nf4Arithmetic, Nf4Options};

/// The package that has the same method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    Peft,
    AdapterHub,
}

impl Peer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Peft => "peft",
            Self::AdapterHub => "adapters",
        }
    }
}

/// A row of the table.
#[derive(Debug, PartialEq)]
pub(crate) struct Method {
    pub(crate) name: &'static str,
    /// As `--set` of `pt sft`: what is not named has `pt sft`'s default, which the peer is told where its own is another.
    pub(crate) sets: &'static [(&'static str, &'static str)],
    /// Highest learning rate, the best of those that `--sweep` tries.
    pub(crate) learning_rate: f64,
    pub(crate) is_nf4: bool,
    pub(crate) peer: Option<Peer>,
}

impl Method {
    const fn new(
        name: &'static str,
        sets: &'static [(&'static str, &'static str)],
        learning_rate: f64,
        peer: Option<Peer>,
    ) -> Self {
        Self { name, sets, learning_rate, is_nf4: false, peer }
    }

    /// The model alone: nothing is trained.
    pub(crate) fn is_base(&self) -> bool {
        self.name.starts_with("base")
    }

    /// How the base is loaded; in 4 bits as `pt sft --weights nf4` does it.
    pub(crate) fn format(&self) -> LinearFormat {
        match self.is_nf4 {
            false => LinearFormat::AsStored,
            true => LinearFormat::Nf4 {
                options: Nf4Options { double_quant: true, ..Default::default() },
                arithmetic: Nf4Arithmetic::Exact,
                with_output: false,
            },
        }
    }
}

const PEFT: Option<Peer> = Some(Peer::Peft);

/// In the order of the table. BitDelta is not here: it is made of a fine-tune, not trained on rows.
pub(crate) const METHODS: [Method; 12] = [
    Method::new("base", &[("peft", "null")], 1.0, None),
    Method { is_nf4: true, ..Method::new("base_nf4", &[("peft", "null")], 1.0, None) },
    Method::new("full", &[("peft", "null")], 1e-4, None),
    Method::new("lora", &[("peft", "lora")], 1e-3, PEFT),
    Method::new("dora", &[("peft", "lora"), ("lora.use_dora", "true")], 1e-3, PEFT),
    Method {
        is_nf4: true,
        ..Method::new("qlora", &[("peft", "lora"), ("adamw.variant", "paged_adamw_8bit")], 1e-3, PEFT)
    },
    Method::new("ia3", &[("peft", "ia3")], 1e-2, PEFT),
    Method::new("bitfit", &[("peft", "bitfit")], 1e-2, None),
    Method::new("bottleneck", &[("peft", "bottleneck")], 1e-3, Some(Peer::AdapterHub)),
    Method::new("prompt_tuning", &[("peft", "prompt_tuning")], 1e-1, PEFT),
    Method::new("prefix_tuning", &[("peft", "prefix_tuning")], 1e-2, PEFT),
    Method::new("tinytl", &[("peft", "tinytl")], 3e-3, None),
];

/// By name.
pub(crate) fn find(name: &str) -> anyhow::Result<&'static Method> {
    METHODS.iter().find(|method| method.name == name).ok_or_else(|| {
        let names: Vec<&str> = METHODS.iter().map(|method| method.name).collect();
        anyhow::anyhow!("there is no method `{name}`; there are: {}", names.join(", "))
    })
}
