//! Where the core is, and how mistakes are gathered.

use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, quote};
use syn::{DeriveInput, Error, Ident};

/// The path of kafold-core as the deriving crate sees it: by itself or through the facade.
pub(crate) fn core_path() -> Result<TokenStream, Error> {
    use proc_macro_crate::{FoundCrate, crate_name};
    for (package, own_name) in [("kafold-core", "kafold_core"), ("kafold", "kafold")] {
        let name = match crate_name(package) {
            Ok(FoundCrate::Name(name)) => name,
            // Its lib.rs has `extern crate self as …`; its tests and examples see it so anyway.
            Ok(FoundCrate::Itself) => own_name.to_owned(),
            Err(_) => continue,
        };
        let name = Ident::new(&name, Span::call_site());
        return Ok(quote!(::#name));
    }
    Err(Error::new(Span::call_site(), "add `kafold` to the dependencies of this crate"))
}

/// All mistakes of one derive, so that the author sees them at once.
#[derive(Default)]
pub(crate) struct Mistakes(Option<Error>);

impl Mistakes {
    pub(crate) fn add(&mut self, error: Error) {
        match &mut self.0 {
            Some(first) => first.combine(error),
            None => self.0 = Some(error),
        }
    }

    pub(crate) fn at(&mut self, place: impl ToTokens, message: impl std::fmt::Display) {
        self.add(Error::new_spanned(place, message));
    }

    pub(crate) fn into_result(self) -> Result<(), Error> {
        self.0.map_or(Ok(()), Err)
    }
}

/// Refuses type and lifetime parameters: `what` is stored, so it is one definite type.
pub(crate) fn refuse_generics(input: &DeriveInput, what: &str) -> Result<(), Error> {
    if input.generics.params.is_empty() {
        return Ok(());
    }
    let message = format!("{what} is stored, so it is one definite type: remove the parameters");
    Err(Error::new_spanned(&input.generics, message))
}

/// Whether `text` is `[a-z][a-z0-9_]*`.
pub(crate) fn is_snake_case(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_lowercase()) && text.chars().all(is_name_char)
}

/// Whether `c` is `[a-z0-9_]`.
pub(crate) fn is_name_char(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'
}
