//! `#[derive(DomainEvent)]`.

use proc_macro2::TokenStream;
use quote::quote;
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::{
    Attribute, Data, DataEnum, DeriveInput, Error, Expr, ExprLit, Ident, Lit, LitInt, LitStr, Meta,
    Path, Token, Variant,
};

use crate::support::{Mistakes, core_path, is_name_char, is_snake_case, refuse_generics};

/// Longest name of an event, in bytes: it is a header of every record.
const NAME_BYTES_MAX: usize = 100;
/// Longest category, in bytes, as in `kafold_core::ids`.
const CATEGORY_BYTES_MAX: usize = 50;

pub(crate) fn expand(input: &DeriveInput) -> Result<TokenStream, Error> {
    let core = core_path()?;
    let variants = variants_of(input)?;
    let EnumAttribute { category, ignored, upcasters } = enum_attribute(&input.attrs)?;
    let types = event_types(input, variants)?;

    let enum_name = &input.ident;
    let names = types.iter().map(|event_type| &event_type.name);
    let versions = types.iter().map(|event_type| event_type.version);
    let idents = variants.variants.iter().map(|variant| &variant.ident);
    let indices = 0..types.len();
    let upcasters = upcasters.map(|function| {
        quote! {
            fn upcasters() -> #core::codec::Upcasters {
                #function()
            }
        }
    });
    let category = category.map(|category| {
        quote! {
            const CATEGORY: ::core::option::Option<&'static str> =
                ::core::option::Option::Some(#category);
        }
    });
    Ok(quote! {
        #[automatically_derived]
        impl #core::event::DomainEvent for #enum_name {
            #category

            const IGNORED: &'static [&'static str] = &[#(#ignored),*];

            const TYPES: &'static [#core::event::EventType] =
                &[#(#core::event::EventType { name: #names, version: #versions }),*];

            fn type_index(&self) -> usize {
                match self {
                    #(Self::#idents { .. } => #indices,)*
                }
            }

            #upcasters

            fn is_same(&self, other: &Self) -> bool {
                use #core::codec::derived::{ByEquality as _, ByNothing as _, Pair};
                (&Pair(self, other)).is_same()
            }

            fn codec() -> &'static #core::codec::Codec {
                static CODEC: ::std::sync::OnceLock<#core::codec::Codec> =
                    ::std::sync::OnceLock::new();
                CODEC.get_or_init(#core::codec::Codec::of::<Self>)
            }
        }
    })
}

fn variants_of(input: &DeriveInput) -> Result<&DataEnum, Error> {
    let Data::Enum(variants) = &input.data else {
        let message = "a domain event is an enum with one variant for everything that can happen";
        return Err(Error::new_spanned(&input.ident, message));
    };
    refuse_generics(input, "a domain event")?;
    if variants.variants.is_empty() {
        let message = "nothing can happen yet: add a variant for the first event";
        return Err(Error::new_spanned(&input.ident, message));
    }
    Ok(variants)
}

/// `#[event("order.placed", version = 1)]`.
struct TypeAttribute {
    name: LitStr,
    version: u32,
}

impl Parse for TypeAttribute {
    fn parse(input: ParseStream<'_>) -> Result<Self, Error> {
        let name = input
            .parse()
            .map_err(|error| Error::new(error.span(), "expected the event's stored name first"))?;
        let mut version = 1;
        if !input.is_empty() {
            input.parse::<Token![,]>()?;
        }
        if !input.is_empty() {
            expect_key(input, "version")?;
            version = parse_version(&input.parse()?)?;
            input.parse::<Option<Token![,]>>()?;
        }
        Ok(Self { name, version })
    }
}

fn parse_version(literal: &LitInt) -> Result<u32, Error> {
    match literal.base10_parse() {
        Ok(0) => Err(Error::new(literal.span(), "versions count from 1")),
        Ok(version) => Ok(version),
        Err(_) => Err(Error::new(literal.span(), "a version is a number from 1 to 4294967295")),
    }
}

fn expect_key(input: ParseStream<'_>, key: &str) -> Result<(), Error> {
    let found: Ident = input.parse()?;
    if found != key {
        return Err(Error::new(found.span(), format!("expected `{key} = …`, found `{found}`")));
    }
    input.parse::<Token![=]>().map(drop)
}

/// The one `#[event(…)]` among the attributes.
fn event_attribute(attributes: &[Attribute]) -> Result<Option<&Attribute>, Error> {
    let mut ours = attributes.iter().filter(|attribute| attribute.path().is_ident("event"));
    let first = ours.next();
    match ours.next() {
        Some(second) => Err(Error::new_spanned(second, "one #[event(…)] is enough")),
        None => Ok(first),
    }
}

/// `#[event(category = "order", ignore("order.noted"), upcasters = upcasters)]` on the enum.
#[derive(Default)]
struct EnumAttribute {
    category: Option<Expr>,
    ignored: Vec<LitStr>,
    upcasters: Option<Path>,
}

impl Parse for EnumAttribute {
    fn parse(input: ParseStream<'_>) -> Result<Self, Error> {
        let mut found = Self::default();
        while !input.is_empty() {
            let key: Ident = input.parse()?;
            match key.to_string().as_str() {
                "category" => {
                    input.parse::<Token![=]>()?;
                    let category = input.parse()?;
                    if let Some(mistake) = category_mistake(&category) {
                        return Err(Error::new_spanned(&category, mistake));
                    }
                    if found.category.replace(category).is_some() {
                        return Err(Error::new(key.span(), "the enum has a category already"));
                    }
                }
                "upcasters" => {
                    input.parse::<Token![=]>()?;
                    found.upcasters = Some(input.call(Path::parse_mod_style)?);
                }
                "ignore" => {
                    let names;
                    syn::parenthesized!(names in input);
                    let names = Punctuated::<LitStr, Token![,]>::parse_terminated(&names)?;
                    found.ignored.extend(names);
                }
                other => {
                    let message = format!(
                        "expected `category = …`, `ignore(…)` or `upcasters = …`, found `{other}`"
                    );
                    return Err(Error::new(key.span(), message));
                }
            }
            if !input.is_empty() {
                input.parse::<Token![,]>()?;
            }
        }
        Ok(found)
    }
}

fn enum_attribute(attributes: &[Attribute]) -> Result<EnumAttribute, Error> {
    let Some(attribute) = event_attribute(attributes)? else { return Ok(EnumAttribute::default()) };
    let found: EnumAttribute = attribute.parse_args()?;
    for name in &found.ignored {
        if let Some(mistake) = name_mistake(&name.value()) {
            return Err(Error::new_spanned(name, mistake));
        }
    }
    Ok(found)
}

fn event_types(input: &DeriveInput, variants: &DataEnum) -> Result<Vec<TypeAttribute>, Error> {
    let mut mistakes = Mistakes::default();
    refuse_serde(&input.attrs, &ENUM_SERDE, &mut mistakes);
    let mut types: Vec<TypeAttribute> = Vec::new();
    for variant in &variants.variants {
        refuse_serde(&variant.attrs, &VARIANT_SERDE, &mut mistakes);
        match event_type(&input.ident, variant) {
            Ok(found) => {
                let twin = types.iter().find(|known| known.name.value() == found.name.value());
                if let Some(first) = twin {
                    let name = first.name.value();
                    mistakes.at(&found.name, format!("the name {name:?} is taken: every variant has its own; an older shape of an event is an upcaster, not a variant"));
                    mistakes.at(&first.name, format!("the name {name:?} is first used here"));
                }
                types.push(found);
            }
            Err(error) => mistakes.add(error),
        }
    }
    mistakes.into_result().map(|()| types)
}

fn event_type(enum_name: &Ident, variant: &Variant) -> Result<TypeAttribute, Error> {
    let Some(attribute) = event_attribute(&variant.attrs)? else {
        let message = format!(
            "this event has no stored name: add #[event({:?}, version = 1)]",
            suggested_name(enum_name, &variant.ident)
        );
        return Err(Error::new_spanned(&variant.ident, message));
    };
    let found: TypeAttribute = attribute.parse_args()?;
    match name_mistake(&found.name.value()) {
        Some(mistake) => Err(Error::new_spanned(&found.name, mistake)),
        None => Ok(found),
    }
}

/// Returns the mistake of a category that is written as a literal.
fn category_mistake(category: &Expr) -> Option<String> {
    let Expr::Lit(ExprLit { lit: Lit::Str(literal), .. }) = category else { return None };
    let (category, bytes) = (literal.value(), literal.value().len());
    (!is_snake_case(&category) || bytes > CATEGORY_BYTES_MAX).then(|| {
        format!(
            "a category is [a-z][a-z0-9_]* of at most {CATEGORY_BYTES_MAX} bytes, such as \"bank_account\": it is the \
             first half of the name of each stream"
        )
    })
}

fn name_mistake(name: &str) -> Option<String> {
    if name.len() > NAME_BYTES_MAX {
        return Some(format!(
            "a name has at most {NAME_BYTES_MAX} bytes, this one has {}",
            name.len()
        ));
    }
    let mut parts = name.split('.');
    let first_is_valid = parts.next().is_some_and(is_snake_case);
    if !first_is_valid || !parts.all(|part| !part.is_empty() && part.chars().all(is_name_char)) {
        return Some(
            "a name is lower-case words joined by dots, such as order.placed: \
             [a-z][a-z0-9_]*(.[a-z0-9_]+)*"
                .to_owned(),
        );
    }
    let reserved = name == "kafold" || name.starts_with("kafold.");
    reserved.then(|| "names below kafold are the log's own".to_owned())
}

/// `OrderEvent::Placed` → `order.placed`.
fn suggested_name(enum_name: &Ident, variant: &Ident) -> String {
    let enum_name = enum_name.to_string();
    let aggregate = enum_name.strip_suffix("Event").unwrap_or(&enum_name);
    format!("{}.{}", snake_case(aggregate), snake_case(&variant.to_string()))
}

fn snake_case(camel: &str) -> String {
    let mut snake = String::new();
    for c in camel.chars() {
        if c.is_ascii_uppercase() && !snake.is_empty() {
            snake.push('_');
        }
        snake.push(c.to_ascii_lowercase());
    }
    snake
}

/// What would take an enum out of serde's default representation.
const ENUM_SERDE: [&str; 8] =
    ["tag", "content", "untagged", "from", "try_from", "into", "remote", "transparent"];
/// What would make serde count the variants differently from us.
const VARIANT_SERDE: [&str; 5] =
    ["skip", "skip_serializing", "skip_deserializing", "other", "untagged"];

fn refuse_serde(attributes: &[Attribute], refused: &[&str], mistakes: &mut Mistakes) {
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("serde")) {
        // What does not parse is serde's to complain about.
        let metas = attribute.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated);
        for meta in metas.iter().flatten() {
            if let Some(name) = refused.iter().find(|name| meta.path().is_ident(name)) {
                mistakes.at(
                    meta,
                    format!("the stored type name says which event it is: remove `{name}`"),
                );
            }
        }
    }
}
