//! The expansion, one function per kind of item.

use moe_oracle_table::{Backend, Pair, Scheme, Table, Which, camel};
use proc_macro2::TokenStream;
use quote::{format_ident, quote};

/// Everything.
pub fn table(file: &str, table: &Table) -> TokenStream {
    let schemes = table.scheme.iter().map(scheme);
    let names = user_names(table);
    let dynamic = table.scheme.iter().flat_map(|s| s.pairs.iter().map(move |p| dyn_oracle(s, p)));
    let matrix = table.scheme.iter().flat_map(|s| {
        s.backend.iter().map(move |b| {
            let kernel = format_ident!("{}{}", s.oracle, camel(&b.name));
            let variant = format_ident!("{}", s.oracle);
            quote!((Scheme::#variant, <#kernel<0, 0>>::INFO))
        })
    });
    quote! {
        // Makes cargo rebuild when the table changes.
        const _: &[u8] = include_bytes!(#file);
        #(#schemes)*
        #names
        /// Every legal (scheme, weight key, activation key), each with its monomorphised oracle.
        pub static ORACLES: &[DynOracle] = &[#(#dynamic),*];
        /// Every (scheme, backend) row of the table.
        pub static SUPPORT: &[(Scheme, &KernelInfo)] = &[#(#matrix),*];
    }
}

fn key(constant: &Option<String>) -> TokenStream {
    match constant {
        None => quote!(UNQUANTIZED),
        Some(name) => {
            let name = format_ident!("{name}");
            quote!(#name.bits())
        }
    }
}

/// The bits of names that the crate owns, in the type whose `NAMES` they are.
fn bits(which: &Which, owner: TokenStream) -> TokenStream {
    match which {
        Which::All(_) => quote!(named(&#owner::NAMES, &#owner::NAMES)),
        Which::Some(names) => quote!(named(&[#(#names),*], &#owner::NAMES)),
    }
}

fn scheme(s: &Scheme) -> TokenStream {
    let oracle = format_ident!("{}", s.oracle);
    let backend = format_ident!("{}Backend", s.oracle);
    let aliases = s.pairs.iter().map(|p| alias(&oracle, p));
    let pairs = s.pairs.iter().map(|p| {
        let (w, a) = (key(&p.weight), key(&p.activation));
        quote!((#w, #a))
    });
    let kernels = s.backend.iter().map(|b| kernel(s, b));
    let enumeration = backend_enum(s);
    let variants: Vec<_> = s.backend.iter().map(|b| format_ident!("{}", camel(&b.name))).collect();
    let order = |device: &str| {
        let (here, there): (Vec<_>, Vec<_>) = s.backend.iter().partition(|b| b.device == device);
        let names: Vec<_> = here.iter().chain(&there).map(|b| format_ident!("{}", camel(&b.name))).collect();
        quote!(&[#(#backend::#names),*])
    };
    let (cpu, cuda) = (order("cpu"), order("cuda"));
    let arms = s.backend.iter().zip(&variants).map(|(b, v)| {
        let kernel = format_ident!("{}{}", s.oracle, camel(&b.name));
        quote!(#backend::#v => <#kernel<W, A>>::INFO)
    });
    let named = s.names.means.iter().map(|(name, target)| {
        let (name, target) = (format_ident!("{}", camel(name)), format_ident!("{}", camel(target)));
        quote!(MoeBackend::#name => Ok(Some(#backend::#target)))
    });
    let on_cuda = s.names.on_cuda.iter().map(|(name, target)| {
        let (name, target) = (format_ident!("{}", camel(name)), format_ident!("{}", camel(target)));
        quote!((MoeBackend::#name, Platform::Cuda(_)) => Ok(Some(#backend::#target)))
    });
    let own = s.backend.iter().zip(&variants).map(|(b, v)| {
        let name = format_ident!("{}", camel(&b.name));
        quote!(MoeBackend::#name => Ok(Some(#backend::#v)))
    });
    let idents = |names: &[String]| names.iter().map(|n| format_ident!("{}", camel(n))).collect::<Vec<_>>();
    let auto = idents(&s.names.as_auto);
    let other = idents(&s.names.other_hardware);
    let other_arm =
        (!other.is_empty()).then(|| quote!(#(MoeBackend::#other)|* => Err(Unsupported::NameOfOtherHardware(name)),));
    let mut works: Vec<&str> = vec!["auto"];
    works.extend(s.backend.iter().map(|b| b.name.as_str()));
    works.extend(s.names.means.keys().map(String::as_str));
    works.extend(s.names.as_auto.iter().map(String::as_str));
    let works = works.join(", ");
    let doc = format!(
        "The oracle of the `{}` scheme: zero-sized, its quant keys in `W` (weights) and `A` (activations).",
        s.name
    );
    let name = &s.name;
    quote! {
        #[doc = #doc]
        #[derive(Clone, Copy, Debug, Default)]
        pub struct #oracle<const W: u64, const A: u64>;
        #(#aliases)*
        #enumeration
        #(#kernels)*

        impl<const W: u64, const A: u64> #oracle<W, A> {
            /// The legal pairs of this scheme.
            pub const PAIRS: &'static [(u64, u64)] = &[#(#pairs),*];
            /// The names that [`map_backend`](Self::map) takes.
            pub const NAMES: &'static str = #works;

            /// Fails the build for an illegal key pair; called by every entry point.
            const fn legal() {
                const {
                    assert!(
                        pair_in(Self::PAIRS, W, A),
                        concat!("the `", #name, "` oracle has no kernel for this pair of weight and activation keys: use one of its aliases, or see its PAIRS")
                    )
                }
            }

            /// `MoeKernelOracle::priority_backends`, in const context.
            pub const fn priority(platform: &Platform) -> &'static [#backend] {
                Self::legal();
                match platform {
                    Platform::Cuda(_) => #cuda,
                    _ => #cpu,
                }
            }

            /// `MoeKernelOracle::map_backend`, in const context. `Ok(None)`: the name leaves the choice to us.
            pub const fn map(name: MoeBackend) -> Result<Option<#backend>, Unsupported> {
                Self::legal();
                match name {
                    MoeBackend::Auto #(| MoeBackend::#auto)* => Ok(None),
                    #(#named,)*
                    #(#own,)*
                    #other_arm
                    #[allow(unreachable_patterns)]
                    _ => Err(Unsupported::UnknownName { name, works: Self::NAMES }),
                }
            }

            /// What a name means on a platform: some name another backend on NVIDIA GPUs.
            const fn map_on(name: MoeBackend, platform: &Platform) -> Result<Option<#backend>, Unsupported> {
                match (name, *platform) {
                    #(#on_cuda,)*
                    _ => Self::map(name),
                }
            }

            /// The kernel behind a backend.
            pub const fn kernel(backend: #backend) -> &'static KernelInfo {
                Self::legal();
                match backend { #(#arms),* }
            }

            /// `MoeKernelOracle::select_backend`, in const context.
            pub const fn select(config: &MoeConfig, platform: &Platform, inputs: &SelectInputs) -> Result<Selection<#backend>, SelectError> {
                let order = Self::priority(platform);
                let wanted = match Self::map_on(inputs.backend, platform) {
                    Ok(wanted) => wanted,
                    Err(why) => return Err(SelectError::of_name(Scheme::#oracle, why)),
                };
                let mut error = SelectError::none(Scheme::#oracle);
                let mut i = 0;
                while i < order.len() {
                    let backend = order[i];
                    i += 1;
                    let info = Self::kernel(backend);
                    let passed_over = match wanted {
                        Some(w) => w as u8 != backend as u8,
                        None => info.by_name_only,
                    };
                    if passed_over {
                        continue;
                    }
                    match supports(info, config, platform, inputs, W, A) {
                        Ok(()) => return Ok(Selection { backend, kernel: info }),
                        Err(why) => error = error.with(info.name, why),
                    }
                }
                Err(error)
            }
        }

        impl<const W: u64, const A: u64> MoeKernelOracle for #oracle<W, A> {
            type Backend = #backend;
            type Config = SelectInputs;
            const SCHEME: Scheme = Scheme::#oracle;
            const WEIGHT_KEY: Option<QuantKey> = QuantKey::from_bits(W);
            const ACTIVATION_KEY: Option<QuantKey> = QuantKey::from_bits(A);

            fn priority_backends(_: &MoeConfig, platform: &Platform) -> &'static [#backend] {
                Self::priority(platform)
            }
            fn kernel(backend: #backend) -> &'static KernelInfo {
                #oracle::<W, A>::kernel(backend)
            }
            fn map_backend(name: MoeBackend) -> Result<Option<#backend>, SelectError> {
                Self::map(name).map_err(|why| SelectError::of_name(Scheme::#oracle, why))
            }
            fn select_backend(config: &MoeConfig, platform: &Platform, inputs: &SelectInputs) -> Result<Selection<#backend>, SelectError> {
                Self::select(config, platform, inputs)
            }
        }
    }
}

fn alias(oracle: &proc_macro2::Ident, p: &Pair) -> TokenStream {
    let (alias, doc) = (format_ident!("{}", p.alias), &p.doc);
    let (w, a) = (key(&p.weight), key(&p.activation));
    quote! {
        #[doc = #doc]
        pub type #alias = #oracle<{ #w }, { #a }>;
    }
}

fn backend_enum(s: &Scheme) -> TokenStream {
    let backend = format_ident!("{}Backend", s.oracle);
    let variants: Vec<_> = s.backend.iter().map(|b| format_ident!("{}", camel(&b.name))).collect();
    let names: Vec<_> = s.backend.iter().map(|b| &b.name).collect();
    let doc = format!("Backends of the `{}` oracle.", s.name);
    let docs = s.backend.iter().map(|b| format!("`{}` on {}", b.name, b.device));
    quote! {
        #[doc = #doc]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum #backend { #(#[doc = #docs] #variants),* }

        impl BackendEnum for #backend {
            const ALL: &'static [Self] = &[#(#backend::#variants),*];
            fn name(self) -> &'static str {
                match self { #(#backend::#variants => #names),* }
            }
        }
    }
}

fn kernel(s: &Scheme, b: &Backend) -> TokenStream {
    let kernel = format_ident!("{}{}", s.oracle, camel(&b.name));
    let pairs = b.pairs.of(s.pairs.iter().map(|p| p.alias.as_str()));
    let keys = s.pairs.iter().filter(|p| pairs.contains(&p.alias.as_str())).map(|p| {
        let (w, a) = (key(&p.weight), key(&p.activation));
        quote!((#w, #a))
    });
    let activations = bits(&b.activations, quote!(crate::config::Activation));
    let formats = bits(&b.formats, quote!(crate::config::ActivationFormat));
    let inputs = bits(&b.inputs, quote!(crate::config::InputType));
    let (name, min, max) = (&b.name, b.min, b.max);
    let device = if b.device == "cpu" { quote!(Device::Cpu) } else { quote!(Device::Cuda { min: #min, max: #max }) };
    // The table's check leaves no other words.
    let numerics = format_ident!("{}", camel(&b.numerics));
    let numerics = quote!(Numerics::#numerics);
    let by_name_only = b.by_name_only;
    let experts = format_ident!("{}", camel(&b.experts));
    let experts = quote!(ExpertsKind::#experts);
    let doc = format!("The `{}` kernel of the `{}` scheme: zero-sized, one type per key pair.", b.name, s.name);
    quote! {
        #[doc = #doc]
        #[derive(Clone, Copy, Debug, Default)]
        pub struct #kernel<const W: u64, const A: u64>;

        impl<const W: u64, const A: u64> #kernel<W, A> {
            /// What the table says of it.
            pub const INFO: &'static KernelInfo = &KernelInfo {
                name: #name,
                device: #device,
                numerics: #numerics,
                experts: #experts,
                by_name_only: #by_name_only,
                pairs: &[#(#keys),*],
                activations: #activations,
                formats: #formats,
                inputs: #inputs,
            };
        }
    }
}

fn user_names(table: &Table) -> TokenStream {
    let mut names = std::collections::BTreeSet::new();
    for s in &table.scheme {
        names.extend(s.names.means.keys().chain(&s.names.other_hardware).chain(&s.names.as_auto));
        names.extend(s.backend.iter().map(|b| &b.name));
    }
    let variants: Vec<_> = names.iter().map(|n| format_ident!("{}", camel(n))).collect();
    let docs: Vec<_> = names.iter().map(|n| format!("`{n}`")).collect();
    let names: Vec<_> = names.into_iter().collect();
    quote! {
        /// The names that a user may give a backend. Every scheme knows some of them.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum MoeBackend {
            /// The best that the platform supports.
            #[default]
            Auto,
            #(#[doc = #docs] #variants),*
        }

        impl MoeBackend {
            /// Every name.
            pub const ALL: &'static [MoeBackend] = &[MoeBackend::Auto, #(MoeBackend::#variants),*];
            /// As users write it.
            pub const fn name(self) -> &'static str {
                match self { MoeBackend::Auto => "auto", #(MoeBackend::#variants => #names),* }
            }
        }
    }
}

fn dyn_oracle(s: &Scheme, p: &Pair) -> TokenStream {
    let (alias, variant, name) = (format_ident!("{}", p.alias), format_ident!("{}", s.oracle), &p.alias);
    let (w, a) = (key(&p.weight), key(&p.activation));
    quote!(DynOracle { scheme: Scheme::#variant, alias: #name, weight: #w, activation: #a, vtable: Vtable::of::<#alias>() })
}

#[cfg(test)]
mod tests {
    const ONE_SCHEME: &str = r#"
        kernel = [{ name = "mma_int8", file = "mma.cu" }]
        [[scheme]]
        name = "int8"
        oracle = "Int8"
        pairs = [
          { alias = "Int8Channel", weight = "INT8_STATIC_CHANNEL_SYM", activation = "INT8_DYNAMIC_TOKEN_SYM", doc = "per channel x per token" },
          { alias = "Int8ChannelWeightOnly", weight = "INT8_STATIC_CHANNEL_SYM", doc = "weights only" },
        ]
        [scheme.names]
        means = { emulation = "cpu_reference" }
        other_hardware = ["aiter"]
        as_auto = ["humming"]
        [[scheme.backend]]
        name = "cuda_mma"
        experts = "mma"
        device = "cuda"
        min = 80
        numerics = "weight_only"
        pairs = ["Int8ChannelWeightOnly"]
        activations = ["silu", "gelu"]
        formats = ["standard"]
        kernels = ["mma_int8"]
        [[scheme.backend]]
        name = "cpu_reference"
        experts = "reference"
        device = "cpu"
        numerics = "as_keyed"
        pairs = "all"
        activations = "all"
        formats = "all"
        kernels = []
    "#;

    /// What the macro makes of a small table, to be read in full. BLESS=1 writes it anew.
    #[test]
    fn one_scheme_expands_as_expected() {
        let table = moe_oracle_table::parse(ONE_SCHEME).unwrap();
        let file = syn::parse2(super::table("table.toml", &table)).unwrap();
        let have = prettyplease::unparse(&file);
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/expected/one_scheme.rs");
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(path, &have).unwrap();
        }
        assert_eq!(have, std::fs::read_to_string(path).unwrap(), "BLESS=1 accepts the new expansion");
    }
}
