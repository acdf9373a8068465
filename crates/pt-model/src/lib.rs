//! Decoder language models from Hugging Face and GGUF files.
//!
//! One forward pass over packed prompt groups ([`PackedBatch`]) serves training, scoring and generation. Methods
//! attach at named [`Sites`] and leave the weights alone, so several roles share one model.
//!
//! ```no_run
//! use pt_model::{Bare, CausalLm, GenerateConfig, Message, Pretrained, Sites, generate};
//! use std::rc::Rc;
//!
//! let pretrained = Pretrained::open("SmolLM2-135M-Instruct.Q4_1.gguf")?;
//! let model = CausalLm::load(&pretrained, pt_tensor::Device::Cpu, pt_tensor::Kind::Float)?;
//! let bare: Rc<dyn Sites> = Rc::new(Bare);
//! let tokenizer = pretrained.tokenizer.as_ref().expect("the file carries one");
//! let prompt = tokenizer.encode("The capital of France is")?;
//! let config = GenerateConfig { max_new_tokens: 8, ..Default::default() };
//! let rows = generate(&model, Some(tokenizer), &[prompt], &config, &bare, |_, _| true)?;
//! println!("{}", tokenizer.decode(&rows[0].token_ids, true)?);
//! # Ok::<(), pt_model::ModelError>(())
//! ```
//!
//! | module | holds |
//! | --- | --- |
//! | `batch` | prompt groups on one token axis and who attends to whom |
//! | `config`, `decoder`, `rope`, `sites` | the model and the places where methods attach |
//! | `load`, `gguf` | checkpoints: Hugging Face folders and GGUF files |
//! | `quantize` | checkpoints in bitsandbytes' 4 bits |
//! | `tokenizer`, `chat_template` | text to tokens and back |
//! | `generate` | sampling with a key/value cache |
#![forbid(unsafe_code)]

pub mod batch;
mod chat_template;
mod config;
mod decoder;
mod error;
mod generate;
pub mod gguf;
mod load;
mod quantize;
mod rope;
mod sites;
mod tokenizer;

pub use batch::{Completion, PackedBatch, PromptGroup};
pub use chat_template::{ChatTemplate, Content, Message};
pub use config::{Activation, Architecture, ModelConfig, RopeScaling};
pub use decoder::{CausalLm, LinearFormat, RunOptions, WeightMemory};
pub use error::{ModelError, Result};
pub use generate::{FinishReason, GenerateConfig, Generated, check_prompt, generate};
pub use load::{Pretrained, TensorSource};
pub use pt_tensor::{AttentionPlan, Segment};
pub use quantize::{is_block_linear, quantize_checkpoint, quantized_config};
pub use sites::{Bare, Branch, BranchSite, GapSite, Linear, Past, Sites, TokenOrder, Tokens, VirtualTokens};
pub use tokenizer::Tokenizer;
