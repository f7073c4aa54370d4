# The only code that runs at CPL 0: entry, application processors, exceptions, the services that Rust asks for.
# On some hosts it is interpreted, so it uses plain integer instructions only and as few as it can.

.set MAX_CPUS, 32
.set CODE64, 0x08
.set DATA, 0x10
.set USER_DATA, 0x1b
.set USER_CODE, 0x23
.set CODE32, 0x28
.set TSS0, 0x30
.set VECTORS, 48
.set VECTOR_TIMER, 0x20
.set VECTOR_SPURIOUS, 0x2f
.set KERNEL_STACK_SHIFT, 11
.set USER_STACK_SHIFT, 14

# --- PVH: where a VMM enters in 32-bit protected mode without paging, EBX = hvm_start_info ---
.section .note.pvh, "a", @note
.align 4
.long 4
.long 8
.long 18
.asciz "Xen"
.quad pvh_start

.section .boot.text, "ax", @progbits
.code32
.global pvh_start
pvh_start:
    cld
    mov dword ptr [start_info_address], ebx
    xor edi, edi
    jmp enter_long_mode

# --- Application processors: copied to a page below 1 MiB, entered in real mode ---
.code16
.global ap_trampoline
ap_trampoline:
    cli
    cld
    mov ax, cs
    mov ds, ax
    # lgdt ds:[ap_gdtr - ap_trampoline]
    .byte 0x0f, 0x01, 0x16
    .word ap_gdtr - ap_trampoline
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long ap_protected
    .word CODE32
.align 4
ap_gdtr:
    .word gdt_end - gdt - 1
    .long gdt
.global ap_trampoline_end
ap_trampoline_end:

.code32
ap_protected:
    mov eax, DATA
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov edi, dword ptr [ap_index]

# EDI = index of this CPU.
enter_long_mode:
    lgdt [gdtr]
    # PAE, and what SSE code at CPL 3 needs: OSFXSR, OSXMMEXCPT.
    mov eax, 0x620
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    # EFER.LME
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    # PG, WP, ET, MP, PE; not CD, NW, EM, TS.
    mov eax, 0x80010013
    mov cr0, eax
    .byte 0xea
    .long long_mode
    .word CODE64

.code64
long_mode:
    mov eax, DATA
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax

    lea eax, [rdi + 1]
    shl eax, KERNEL_STACK_SHIFT
    lea rsp, [rax + kernel_stacks]

    # This CPU's TSS: the stack for exceptions, no I/O bitmap.
    mov edx, edi
    shl edx, 7
    add edx, offset tss
    mov qword ptr [rdx + 4], rsp
    mov word ptr [rdx + 102], 104
    mov ecx, edi
    shl ecx, 4
    add ecx, TSS0
    mov word ptr [rcx + gdt], 103
    mov word ptr [rcx + gdt + 2], dx
    mov eax, edx
    shr eax, 16
    mov byte ptr [rcx + gdt + 4], al
    mov byte ptr [rcx + gdt + 5], 0x89
    mov byte ptr [rcx + gdt + 6], 0
    shr eax, 8
    mov byte ptr [rcx + gdt + 7], al
    mov qword ptr [rcx + gdt + 8], 0
    ltr cx

    test edi, edi
    jnz 2f
    # The first CPU fills the IDT: 64-bit interrupt gates to stubs of 16 bytes each.
    mov eax, offset stubs
    mov edx, offset idt
    mov ecx, VECTORS
1:
    mov word ptr [rdx], ax
    mov word ptr [rdx + 2], CODE64
    mov word ptr [rdx + 4], 0x8e00
    mov ebx, eax
    shr ebx, 16
    mov word ptr [rdx + 6], bx
    mov qword ptr [rdx + 8], 0
    add eax, 16
    add edx, 16
    dec ecx
    jnz 1b
2:
    lidt [idtr]

    # To CPL 3, interrupts off, the first argument still in RDI. A function expects RSP = 16n + 8.
    lea eax, [rdi + 1]
    shl eax, USER_STACK_SHIFT
    lea rax, [rax + user_stacks - 8]
    push USER_DATA
    push rax
    push 2
    push USER_CODE
    push offset bare_main
    iretq

# --- Exceptions and interrupts ---
.align 16
stubs:
.set v, 0
.rept VECTORS
    .align 16
    .if v == 6
        jmp undefined_opcode
    .elseif v == VECTOR_TIMER
        jmp timer_interrupt
    .elseif v == VECTOR_SPURIOUS
        iretq
    .elseif (v == 8) || ((v >= 10) && (v <= 14)) || (v == 17) || (v == 21) || (v == 29) || (v == 30)
        push v
        jmp fault
    .else
        push 0
        push v
        jmp fault
    .endif
    .set v, v + 1
.endr
.align 16

timer_interrupt:
    push rax
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    pop rax
    iretq

# One particular `ud2` is the call of a service (an exception is delivered alike on every host; software
# interrupts and SYSCALL are not): EAX = service, EDX = port, ECX = byte or count, RSI = bytes. Any other is a fault.
undefined_opcode:
    cmp qword ptr [rsp], offset service_trap
    jne 9f
    add qword ptr [rsp], 2
    cmp eax, 1
    jb service_out
    je service_in
    cmp eax, 3
    jb service_write
    je service_wait
    cmp eax, 5
    je service_triple_fault
8:
    cli
    hlt
    jmp 8b
9:
    push 0
    push 6
    jmp fault

service_out:
    mov eax, ecx
    out dx, al
    iretq

service_in:
    xor eax, eax
    in al, dx
    iretq

service_write:
    mov al, byte ptr [rsi]
    out dx, al
    inc rsi
    dec ecx
    jnz service_write
    iretq

# The interrupt shadow of STI covers HLT: a timer that has already fired still wakes it.
service_wait:
    sti
    hlt
    cli
    iretq

service_triple_fault:
    lidt [no_idt]
    ud2

# Stack: vector, error code, RIP, CS, RFLAGS, RSP, SS. Goes on at CPL 3 in `bare_fault`, below the red zone of
# the code that faulted.
fault:
    pop rdi
    pop rcx
    mov rsi, qword ptr [rsp]
    mov rdx, cr2
    mov rax, qword ptr [rsp + 24]
    and rax, -16
    sub rax, 264
    push USER_DATA
    push rax
    push 2
    push USER_CODE
    push offset bare_fault
    iretq

# --- Called by Rust at CPL 3: service(EDI = number, ESI = port, EDX = byte or count, RCX = bytes) -> EAX ---
.global service
service:
    mov eax, edi
    mov edi, esi
    mov rsi, rcx
    mov ecx, edx
    mov edx, edi
.global service_trap
service_trap:
    ud2
    ret

# --- Tables ---
.section .boot.tables, "aw", @progbits
.align 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
.global pdpt
pdpt:
    .quad pd + 7
    .quad pd + 0x1000 + 7
    .quad pd + 0x2000 + 7
    .quad pd + 0x3000 + 7
    .fill 508, 8, 0
# The first 4 GiB as they are, in pages of 2 MiB, for CPL 3 too. Rust adds what lies above.
pd:
.set a, 0
.rept 2048
    .quad a + 0x87
    .set a, a + 0x200000
.endr

.align 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
    .quad 0x00cf9b000000ffff
    .fill 2 * MAX_CPUS, 8, 0
gdt_end:
gdtr:
    .word gdt_end - gdt - 1
    .quad gdt
idtr:
    .word VECTORS * 16 - 1
    .quad idt
no_idt:
    .word 0
    .quad 0
.align 4
.global start_info_address
start_info_address:
    .long 0
.global ap_index
ap_index:
    .long 0

.section .bss.boot, "aw", @nobits
.align 4096
idt:
    .skip VECTORS * 16
.align 128
tss:
    .skip 128 * MAX_CPUS
.align 4096
kernel_stacks:
    .skip MAX_CPUS << KERNEL_STACK_SHIFT
user_stacks:
    .skip MAX_CPUS << USER_STACK_SHIFT
