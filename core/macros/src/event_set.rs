//! `#[derive(EventSet)]`.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Data, DeriveInput, Error, Fields, Ident, Type, Variant};

use crate::support::{Mistakes, core_path, refuse_generics};

pub(crate) fn expand(input: &DeriveInput) -> Result<TokenStream, Error> {
    let core = core_path()?;
    let members = members_of(input)?;
    let name = &input.ident;
    let idents: Vec<&Ident> = members.iter().map(|member| member.ident).collect();
    let types: Vec<&Type> = members.iter().map(|member| member.ty).collect();
    let categories: Vec<_> = types
        .iter()
        .map(|ty| quote_spanned!(ty.span()=> <#ty as #core::event::DomainEvent>::CATEGORY))
        .collect();
    Ok(quote! {
        #[automatically_derived]
        impl #core::event_set::EventSet for #name {
            const LEARNS_CATEGORY: bool = false;

            fn read(
                event: &#core::event::RecordedEvent,
            ) -> ::core::result::Result<#core::event_set::ReadEvent<Self>, #core::codec::CodecError> {
                let category = ::core::option::Option::Some(event.stream.category());
                #(if category == #categories {
                    let read = <#types as #core::event_set::EventSet>::read(event)?;
                    return ::core::result::Result::Ok(read.map(Self::#idents));
                })*
                ::core::result::Result::Ok(#core::event_set::ReadEvent::PassedBy)
            }

            fn category_of(event_type: &str) -> ::core::option::Option<&'static str> {
                ::core::option::Option::None
                    #(.or_else(|| <#types as #core::event_set::EventSet>::category_of(event_type)))*
            }

            fn stored_type(&self) -> #core::event::EventType {
                match self {
                    #(Self::#idents(event) => #core::event_set::EventSet::stored_type(event),)*
                }
            }

            fn to_payload(
                &self,
            ) -> ::core::result::Result<::std::vec::Vec<u8>, #core::codec::CodecError> {
                match self {
                    #(Self::#idents(event) => #core::event_set::EventSet::to_payload(event),)*
                }
            }
        }

        const _: () = #core::event_set::derived::check_categories(&[#(#categories),*]);
    })
}

/// A variant, with the type of its events.
struct Member<'a> {
    ident: &'a Ident,
    ty: &'a Type,
}

fn members_of(input: &DeriveInput) -> Result<Vec<Member<'_>>, Error> {
    let shape = "a set of events is an enum: each variant holds the events of one aggregate, such as \
                 `Order(OrderEvent)`";
    let Data::Enum(data) = &input.data else {
        return Err(Error::new_spanned(&input.ident, shape));
    };
    refuse_generics(input, "a set of events")?;
    if data.variants.is_empty() {
        return Err(Error::new_spanned(&input.ident, shape));
    }
    let (mut members, mut mistakes) = (Vec::new(), Mistakes::default());
    for Variant { ident, fields, .. } in &data.variants {
        match fields {
            Fields::Unnamed(fields) if fields.unnamed.len() == 1 => {
                members.push(Member { ident, ty: &fields.unnamed[0].ty });
            }
            _ => mistakes.at(ident, shape),
        }
    }
    mistakes.into_result().map(|()| members)
}
